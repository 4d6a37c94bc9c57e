"""The sbatch command of a run, put together and given to Slurm, without a shell in between."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from stepladder.console import quoted
from stepladder.errors import LaunchError

# What Slurm's names, times and counts are made of; an option can then not become two.
NAME = re.compile(r"[\w.,:@+%\[\]&|*()-]+")


def options(given: dict[str, str | int | None]) -> list[str]:
    """sbatch's options from those of submit.py that were given.

    Raises:
        LaunchError: a value that is no name, number or time.
    """
    found = []
    for name, value in given.items():
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if not NAME.fullmatch(str(value)):
            raise LaunchError(f"{flag} {value!r} is no name, number or time that Slurm knows", where="command line")
        found.append(f"{flag}={value}")
    return found


def log_pattern(folder: Path, name: str) -> str:
    """A file name as sbatch takes it, which reads `%` and a backslash as its own."""
    if "\\" in str(folder) or any(ord(sign) < 32 for sign in str(folder)):
        raise LaunchError(f"output_dir {str(folder)!r} cannot hold a job's log", way_out="another --output_dir")
    return f"{str(folder).replace('%', '%%')}/{name}"


def sbatch(command: list[str]) -> str:
    """Give a command to Slurm; returns what it printed.

    Raises:
        LaunchError: there is no Slurm here, or it refuses, with its own words.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("there is no sbatch here", way_out="run it on your cluster's login node, or --dry_run")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace("sbatch: error: ", "").replace("allocation failure: ", "")
        raise LaunchError(
            f"Slurm refuses the job: {' '.join(said.split())}",
            why=quoted(*command),
            way_out="sinfo shows the partitions with their limits, sacctmgr show assoc your accounts",
        )
    return (done.stdout + done.stderr).strip()
