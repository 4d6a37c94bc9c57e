"""Pages whose commands are run as they are written: by the tests, shortened; by `make workshop` in full.

    python tests/pages.py docs/workshop/2.2-rank-doubling.md

A page's blocks marked `bash` are run from the top, a command a line, in the folder of the repository; one
that fails ends it, but for those with `|| true`. What follows a block may say

    <!-- in tests: sft --max_steps 3; compare --limit 2 -->    flags that the tests add to its scripts
    <!-- output: REGEX -->                                      which lines the `text` block below it shows
    <!-- paragraphs: REGEX -->                                  the same for paragraphs, by any line of theirs

and `make workshop` puts what was printed into that `text` block. The scripts run in forks of one process,
which has imported the libraries once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepladder.training.launch import devices

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```bash\n(?P<bash>.*?)^```\n(?P<marks>(?:\s*<!--.*?-->\n)*)(?P<text>\s*```text\n.*?^```\n)?",
                   re.MULTILINE | re.DOTALL)  # fmt: skip


@dataclass
class Block:
    """Commands, the flags that shorten them by script, and which lines or paragraphs of their output are shown."""

    commands: list[str]
    shorter: dict[str, list[str]] = field(default_factory=dict)
    shown: str = "."
    by_paragraph: bool = False
    marked: bool = False  # says that output is shown
    text: str = ""


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        lines = match["bash"].replace("\\\n", " ").splitlines()
        block = Block([line for line in lines if line.strip() and not line.startswith("#")])
        block.text = re.sub(r"```(text)?", "", match["text"] or "").strip()
        for kind, text in re.findall(r"<!-- (in tests|output|paragraphs): (.*?) -->", match["marks"]):
            if kind != "in tests":
                block.shown, block.by_paragraph, block.marked = text, kind == "paragraphs", True
            else:
                words = [shlex.split(part) for part in text.split(";")]
                block.shorter = {name: flags for name, *flags in words}
        found.append(block)
    return found


def unfilled(page: Path) -> list[str]:
    """The commands whose output is announced by a mark and stands nowhere."""
    return [block.commands[0] for block in blocks(page) if block.marked and not block.text]


def chosen(output: str, block: Block) -> list[str]:
    """The lines of an output that the block shows."""
    if not block.by_paragraph:
        return [line.rstrip() for line in output.splitlines() if re.search(block.shown, line)]
    parts = [part for part in output.split("\n\n") if re.search(block.shown, part, re.MULTILINE)]
    return [line.rstrip() for line in "\n\n".join(parts).splitlines()]


def shortened(command: str, block: Block) -> str:
    """The command with the flags that its script is given in tests, in place of its own of that name."""
    name = next((name for name in block.shorter if f"scripts/{name}.py" in command), None)
    if name is None:
        return command
    flags = block.shorter[name]
    command, bar, otherwise = command.partition(" || ")
    for flag in (word for word in flags if word.startswith("--")):
        command = re.sub(rf" {flag} [^ ]+", "", command)
    return f"{command} {shlex.join(flags)}{bar}{otherwise}"


def lay_out(folder: Path) -> None:
    """Make `folder` look like the repository's, but for runs/, which is its own."""
    for name in ("scripts", "recipes", "data", "docs", "slurm", "accelerate_configs", "ds_configs", "tests", "src"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "models").mkdir()
    (folder / "models/smollm2-135m-instruct").symlink_to(ROOT / "models/smollm2-135m-instruct")


class Player:
    """A process that has imported the libraries, and plays one command after the other."""

    def __init__(self) -> None:
        # sft.py, as a person types it, starts anew under tcmalloc; a fork has what its parent has.
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**devices.tcmalloc_environment(), **os.environ},
        )  # fmt: skip

    def play(self, command: str, folder: Path) -> tuple[int, str]:
        """The exit code and all that was printed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([command, str(folder)]) + "\n")
        self.process.stdin.flush()
        code, output = json.loads(self.process.stdout.readline())
        return code, output

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve() -> None:
    import many_runs

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    many_runs.import_all()
    log = Path(tempfile.mkdtemp()) / "output"
    for line in sys.stdin:
        command, folder = json.loads(line)
        words = shlex.split(command)
        if words[0] == "python" and "||" not in words:
            code = _forked(words[1:], folder, log)
        else:
            env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            with log.open("w") as out:
                code = subprocess.run(command, shell=True, cwd=folder, env=env, stdout=out, stderr=out).returncode
        answers.write(json.dumps([code, log.read_text(encoding="utf-8", errors="replace")]) + "\n")
        answers.flush()


def _forked(words: list[str], folder: str, log: Path) -> int:
    """Run a script in a fork: it may change whatever it likes."""
    if (child := os.fork()) == 0:
        code: Any = 1
        try:
            os.chdir(folder)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refresh(page: Path, player: Player) -> None:
    """Run a page in full, and write what was printed into it."""
    text = page.read_text(encoding="utf-8")
    for block, match in zip(blocks(page), BLOCK.finditer(text), strict=True):
        printed = []
        for command in block.commands:
            code, output = player.play(command, ROOT)
            print(f"$ {command}\n{output}", flush=True)
            if code:
                sys.exit(f"✘ {page.name}: exit code {code}")
            printed += chosen(output, block)
        if block.marked and not (match["text"] and printed):
            sys.exit(f"✘ {page.name}: no text block, or nothing to show in it, below {block.commands[0]}")
        if match["text"]:
            new = match[0].replace(match["text"], "\n```text\n" + "\n".join(printed) + "\n```\n")
            page.write_text(page.read_text(encoding="utf-8").replace(match[0], new), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    player = Player()
    for page in args.pages:
        refresh(page, player)
    player.close()


if __name__ == "__main__":
    main()
