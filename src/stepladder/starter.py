"""A first folder to work in: a recipe, rows to replace, launch configurations and job templates."""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

from stepladder import files
from stepladder.console import quote_for_shell
from stepladder.errors import RunError
from stepladder.installation import ROOT

# Rows that stand in for the user's: the first of each set.
ROWS = {"train.jsonl": ("techco.jsonl", 40), "eval.jsonl": ("techco_eval.jsonl", 12)}
COPIED = ("accelerate_configs", "ds_configs", "slurm")
SITE = "slurm/site.sh"  # read by each job; a clone's own must not be copied
NAMED = 5  # files in the way that the message names
FIRST_COMMANDS = ("fetch_model", "check --recipe mine", "sft --recipe mine", "compare --tuned runs/mine")


def make_starter(folder: Path) -> None:
    """Fill a folder, which must be new or empty.

    Raises:
        RunError: it is no folder, cannot be written, or holds something.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file", help="the name of a new folder")
    if folder.is_dir() and (there := sorted(file.name for file in folder.iterdir())):
        names = ", ".join(there[:NAMED]) + ", …" * (len(there) > NAMED)
        raise RunError(f"{folder} is not empty: it holds {names}", help="the name of a new folder")
    files.make_folder(folder)
    shutil.copytree(ROOT / "starter", folder, dirs_exist_ok=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(Path(SITE).name))
    for name in ("data", "runs"):
        (folder / name).mkdir()
    for name, (source, count) in ROWS.items():
        with (ROOT / "data" / source).open(encoding="utf-8") as lines:
            (folder / "data" / name).write_text("".join(itertools.islice(lines, count)), encoding="utf-8")
    if sys.prefix != sys.base_prefix:
        (folder / SITE).write_text(_job_environment(), encoding="utf-8")


def _job_environment() -> str:
    """The part of a job's settings that is known here: the virtual environment that Stepladder is installed in."""
    venv = quote_for_shell(sys.prefix)
    return (
        "# shellcheck shell=bash\n# Read by each job; slurm/environment.sh lists what can be set here.\n"
        f"[[ ${{STEPLADDER_CONDA:-}}${{STEPLADDER_CONTAINER:-}} ]] || STEPLADDER_VENV=${{STEPLADDER_VENV-{venv}}}\n"
    )


def next_commands(folder: Path) -> str:
    """What to type in a new folder."""
    lines = [f"cd {quote_for_shell(folder)}", *(f"stepladder {words}" for words in FIRST_COMMANDS)]
    return "\n".join(f"  {line}" for line in lines)
