"""A sweep on this machine, without Slurm: its runs one after the other, rung by rung, then the report on all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from stepladder import installation
from stepladder.cluster import job
from stepladder.cluster.sweep import Rung, Sweep, find_run
from stepladder.console import quote_for_shell, say
from stepladder.errors import EXIT_PREEMPTED, RunError
from stepladder.manifest import read_manifest, status
from stepladder.training.guard import signals

PASSED_ON = [number for number in (signal.SIGTERM, signals.USR1) if number]


def run_sweep(sweep: Sweep, rungs: list[Rung], strategy: str, ranks: int, overrides: list[str]) -> None:
    """Train a sweep's runs and write its report. Run again, it resumes where it was interrupted.

    A run that fails is named, the next one starts, and the sweep ends as failed once its report is written.

    Args:
        strategy: for runs whose sweep names none.
        ranks: processes of each run.
        overrides: keys of every run, as words of a command line.

    Raises:
        SystemExit: a run was interrupted (code 75), and with it the sweep.
        RunError: a run has failed, or the report cannot be written.
    """
    failed: list[str] = []
    for rung in rungs:
        for number in range(rung.runs):
            words = find_run(sweep, rung, number)
            if not words or _is_done([*words, *overrides], rung.stop):
                continue
            command = launch_command([*words, *overrides], strategy, ranks)
            say(f"run {number + 1} of {rung.runs}: {quote_for_shell(*command[1:])}")
            code = _run(command)
            if code == EXIT_PREEMPTED:
                say(f"the sweep was interrupted; the same command resumes it: {sweep.file}")
                sys.exit(EXIT_PREEMPTED)
            if code:
                say(f"⚠ run {number + 1} of {rung.runs} ended with exit code {code}; the next one starts")
                failed.append(Path(job.recipe_of([*words, *overrides]).output_dir).name)
    if not any(status(folder) == "finished" for folder in sweep.folders):
        raise RunError(f"no run of {sweep.file} has finished", help="the first one's message is above")
    if _run([sys.executable, *installation.launched("report").split(), "--sweep", str(sweep.file)]):
        raise RunError(f"the report on {sweep.file} could not be written", help="its message is above")
    if failed:
        raise RunError(
            f"{len(failed)} of the sweep's runs failed: {', '.join(failed)}",
            where=str(sweep.file),
            help="their messages are above; the same command trains them again",
        )


def launch_command(words: list[str], strategy: str, ranks: int) -> list[str]:
    """The command that starts a run of a sweep here.

    Args:
        words: the run's arguments; `--strategy NAME` among them wins over `strategy`.
    """
    own, script = list(words), installation.launched("sft").split()
    if "--strategy" in own:
        at = own.index("--strategy")
        strategy = own[at + 1]
        del own[at : at + 2]
    if ranks == 1 and strategy == "single":
        return [sys.executable, *script, *own]
    config = str(installation.locate(f"accelerate_configs/{strategy}.yaml"))
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(ranks)]
    return [sys.executable, *launch, *script, *own]


def _is_done(words: list[str], stop: int | None) -> bool:
    """Whether a run has come to its end, or to a rung's stop, with the recipe that it would be started with."""
    recipe = job.recipe_of(words)
    folder = Path(recipe.output_dir)
    try:
        manifest: dict[str, Any] = read_manifest(folder, ("status", "totals.steps"))
    except ValueError:
        return False
    if recipe.changes(manifest.get("recipe") or {}):
        return False  # sft.py names what differs
    reached = stop is not None and manifest["totals"]["steps"] >= stop
    return manifest["status"] == "finished" or (manifest["status"] == "preempted" and reached)


def _run(command: list[str]) -> int:
    """Run a command, which gets the signals that are sent to this process; returns its exit code.

    After a signal it is that of an interruption, whatever the command's own is: a run that is interrupted while it
    imports, and `accelerate launch`, whose ranks were interrupted, end with other codes.

    A terminal sends Ctrl-C to both, so SIGINT is only kept from ending this process before the run has saved.
    """
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        if number in PASSED_ON:
            process.send_signal(number)

    process = subprocess.Popen(command)
    before = {number: signal.signal(number, pass_on) for number in (*PASSED_ON, signal.SIGINT)}
    try:
        code = process.wait()
        return EXIT_PREEMPTED if received else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
