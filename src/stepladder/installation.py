"""Where Stepladder's own files lie, and how its commands are spelled in the folder that a command runs in.

Every relative path counts from that folder. What is not there and ships with Stepladder (`FOLDERS`) is taken from
`ROOT`, by `locate` alone: a path that two functions resolved would lead to two places.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from pathlib import Path

from stepladder.console import quote_for_shell

PACKAGE = Path(__file__).parent
# setup.py copies the folders into a built package. In a clone they lie at the repository's root.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent.parent
SCRIPTS = ROOT / "scripts"
FOLDERS = ("recipes", "accelerate_configs", "ds_configs", "data", "slurm")
IN_A_CLONE = re.compile(r"(?:(python) )?scripts/(\w+)\.py|(?<![\w./-])(\w+)\.py(?!\w)")
ELSEWHERE = re.compile(r"(?:(-m) stepladder[. ]|(?<![\w./-])stepladder )(\w+)")
CONFIG = re.compile(r"(?<=--config_file )accelerate_configs/\w+\.yaml")


def locate(path: str | Path) -> Path:
    """The place of a path that a person wrote: from the current folder; where nothing is there, what ships.

    Args:
        path: a file or a folder, absolute, relative, or below a home (`~/…`). It may be missing in both places.
    """
    path = Path(os.path.expanduser(path))
    if path.parts and path.parts[0] in FOLDERS and ".." not in path.parts and not os.path.lexists(path):
        shipped = ROOT / path
        return shipped if os.path.exists(shipped) else path
    return path


def places(path: str | Path) -> str:
    """Where `locate` looks for a path, for the message that nothing is there; empty for an absolute path."""
    path = Path(os.path.expanduser(path))
    if path.is_absolute():
        return ""
    ships = bool(path.parts) and path.parts[0] in FOLDERS
    return f"looked in {Path.cwd()}" + (f", then in {ROOT}, which ships with Stepladder" if ships else "")


def list_siblings(path: Path) -> list[str]:
    """The paths that `locate` finds in the folder of `path`, spelled as `path` is."""
    folders = [path.parent, ROOT / path.parent] if path.parts[:1] and path.parts[0] in FOLDERS else [path.parent]
    return sorted({str(path.parent / file.name) for folder in folders if folder.is_dir() for file in folder.iterdir()})


def list_files(folder: str, pattern: str) -> list[str]:
    """The names that `locate` finds in one of `FOLDERS`: relative to it, without suffix, sorted."""
    places = (Path(folder), ROOT / folder)
    found = {file.relative_to(place).with_suffix("") for place in places for file in place.rglob(pattern)}
    return sorted(map(str, found))


def scripts() -> dict[str, str]:
    """The first line of each command's description, by the command's name."""
    files = sorted(SCRIPTS.glob("*.py"))
    docs = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files}
    return {name: doc.partition("\n")[0] for name, doc in docs.items()}


def is_clone(name: str = "sft") -> bool:
    """Whether the current folder is a clone that holds this script; another project may have a folder scripts/ too."""
    return os.path.isfile(f"scripts/{name}.py") and os.path.isdir("src/stepladder")


def command(name: str) -> str:
    """What to type to run a script here: `python scripts/check.py` in a clone, else `stepladder check`."""
    return f"python scripts/{name}.py" if is_clone(name) else f"stepladder {name}"


def launched(name: str) -> str:
    """The same behind `accelerate launch …`."""
    if is_clone(name):
        return f"scripts/{name}.py"
    return "-m stepladder.sft" if name == "sft" else f"-m stepladder {name}"


def launch_command(strategy: str, ranks: int | str | None = None, nodes: str = "") -> str:
    """`accelerate launch` with a file of accelerate_configs/ and, where `ranks` is given, sft.py without its arguments.

    Args:
        nodes: further words, which begin with a blank.
    """
    start = f"accelerate launch --config_file {quote_for_shell(locate(f'accelerate_configs/{strategy}.yaml'))}{nodes}"
    return start if ranks is None else f"{start} --num_processes {ranks} {launched('sft')}"


def install_command(package: str, extra: str = "") -> str:
    """How to install a package that is missing, with what the same extra of pyproject.toml needs."""
    if is_clone():
        return f'pip install -c constraints.txt -e ".[{extra}]"' if extra else "make install"
    return f"pip install {quote_for_shell(package)}"


def typed_command() -> str:
    """The command line of this process, as it can be typed again."""
    return f"{command(Path(sys.argv[0]).stem)} {quote_for_shell(*sys.argv[1:])}"


def localize(text: str) -> str:
    """A text that names commands, with each spelled as `command` and `launched` do, and configurations located.

    Args:
        text: of a script's docstring (`python scripts/check.py`, `check.py`), or of a table (`stepladder check`,
            `accelerate launch … -m stepladder.sft`).
    """

    def from_a_clone(found: re.Match[str]) -> str:
        name = found[2] or found[3]
        if not (SCRIPTS / f"{name}.py").is_file() or is_clone(name):
            return found[0]
        return launched(name) if found[2] and not found[1] else command(name)

    def from_elsewhere(found: re.Match[str]) -> str:
        if not (SCRIPTS / f"{found[2]}.py").is_file():
            return found[0]
        return launched(found[2]) if found[1] else command(found[2])

    text = ELSEWHERE.sub(from_elsewhere, IN_A_CLONE.sub(from_a_clone, text))
    return CONFIG.sub(lambda found: quote_for_shell(locate(found[0])), text)


def run_script(name: str) -> None:
    """Run a script as the main module, as `python scripts/NAME.py` does; `sys.argv` holds its arguments from 1 on.

    Processes that it spawns read the script's file again, since that is the main module's.
    """
    try:
        here = os.getcwd()
    except OSError:
        print("✘ launch: the current folder is not there any more\n  help: cd to another one", file=sys.stderr)
        sys.exit(2)
    if sys.path[:1] == [here]:  # of `python -m`: a folder wandb/ there would pass for the package
        del sys.path[0]
    # For DeepSpeed Accelerate puts it into PYTHONPATH (`prepare_deepspeed_cmd_env`); libraries come first there too.
    sys.path.sort(key=lambda path: path == here)
    sys.argv[0] = str(SCRIPTS / f"{name}.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
