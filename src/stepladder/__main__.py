"""The command `stepladder NAME …`: a script by its name, from any folder."""

from __future__ import annotations

import sys

import stepladder
from stepladder import errors, installation
from stepladder.suggest import suggest


def main() -> None:
    """Run the script that the first argument names, with the others; without one, list the scripts."""
    name, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in installation.scripts():
        sys.argv = [name, *rest]
        installation.run_script(name)
    else:
        errors.exit_with(lambda: print(_answer(name)))


def _answer(name: str) -> str:
    """The list of commands, or the version.

    Raises:
        LaunchError: there is no such command.
    """
    known = installation.scripts()
    if name == "--version":
        return f"stepladder {stepladder.__version__}"
    if name not in ("-h", "--help", "help"):
        help = suggest(name, known) or f"one of {', '.join(known)}"
        raise errors.LaunchError(f"there is no command '{name}'", where="command line", help=help)
    width = max(map(len, known))
    lines = ["usage: stepladder COMMAND …", "", *(f"  {name:{width}}  {first}" for name, first in known.items())]
    return "\n".join([*lines, "", "Each has --help with an example. A first folder to work in: stepladder init DIR"])


if __name__ == "__main__":
    main()
