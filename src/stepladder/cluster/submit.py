"""The sbatch command of a run, put together and given to Slurm, without a shell in between."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from stepladder.console import quoted
from stepladder.errors import LaunchError

PATIENCE = 30  # seconds that Slurm may take to tell what its nodes have
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


def per_gpu(gpus: str, partition: str | None) -> tuple[int, int] | None:
    """The share of a node that comes with one of its GPUs: cores, and GiB of memory (0 where Slurm was not told).

    Each the smallest among the partition's nodes that have so many GPUs; None where Slurm names no such node.

    Args:
        gpus: those of a node that the job asks for: `8` or `h100:8`.
        partition: as for sbatch; its default where there is none.
    """
    kind, _, count = gpus.rpartition(":")
    names = partition or os.environ.get("SBATCH_PARTITION") or ""
    if not names:
        names = ",".join(word[:-1] for word in _ask("sinfo", "--noheader", "--format=%P").split() if word[-1] == "*")
    shares = []
    for node in _ask("scontrol", "--oneliner", "show", "node").splitlines():
        if names and not {*names.split(",")} & {*_field(node, "Partitions").split(",")}:
            continue
        # gpu:h100:4(S:0-1),gpu:a100_1g.10gb:7
        found = re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)", _field(node, "Gres"))
        if sum(int(number) for name, number in found if not kind or name == kind) < int(count):
            continue
        every = sum(int(number) for _, number in found)
        cores, memory, system = (
            int(_field(node, name, r"\d+") or 0) for name in ("CPUTot", "RealMemory", "MemSpecLimit")
        )
        cores = int(_field(node, "CPUEfctv", r"\d+") or cores)  # without those that are the system's own
        shares.append((cores // every, max(0, memory - system) // every >> 10))
    if not shares:
        return None
    return min(cores for cores, _ in shares), min(memory for _, memory in shares)


def _field(node: str, name: str, pattern: str = r"\S+") -> str:
    found = re.search(rf"(?:^| ){name}=({pattern})", node)
    return found[1] if found else ""


def _ask(*command: str) -> str:
    """What a command of Slurm prints; nothing where it cannot."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def log_pattern(folder: Path, name: str) -> str:
    """A file name as sbatch takes it, which reads `%` and a backslash as its own."""
    if "\\" in str(folder) or any(ord(sign) < 32 for sign in str(folder)):
        raise LaunchError(f"output_dir {str(folder)!r} cannot hold a job's log", help="another --output_dir")
    return f"{str(folder).replace('%', '%%')}/{name}"


def sbatch(command: list[str]) -> str:
    """Give a command to Slurm; returns what it printed.

    Raises:
        LaunchError: there is no Slurm here, or it refuses, with its own words.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("there is no sbatch here", help="run it on your cluster's login node, or --dry_run")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace("sbatch: error: ", "").replace("allocation failure: ", "")
        raise LaunchError(
            f"Slurm refuses the job: {' '.join(said.split())}",
            why=quoted(*command),
            help="sinfo shows the partitions with their limits, sacctmgr show assoc your accounts",
        )
    return (done.stdout + done.stderr).strip()
