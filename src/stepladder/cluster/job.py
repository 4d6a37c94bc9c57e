"""What a batch script asks Stepladder: where the run lies, what to run, and whether the job is to be queued again.

    python -m stepladder.cluster.job folder --recipe lora --max_steps 20     (base, held_out, merge too)
    python -m stepladder.cluster.job element 0 slurm/sweeps/lora_rank.yaml
    python -m stepladder.cluster.job after runs/lora

Light, since it runs on every start: no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from stepladder import console, errors, installation
from stepladder.cluster import staging, sweep
from stepladder.data import mixture
from stepladder.manifest import MANIFEST, STUCK_AFTER, read_manifest
from stepladder.model import start
from stepladder.recipe import load

MAX_RESTARTS = 100  # of a job; STEPLADDER_MAX_RESTARTS sets another
STOP = "stop"  # a file of this name in the run folder ends the chain: touch runs/lora/stop


def recipe_of(words: list[str]) -> load.Recipe:
    """The recipe that a job's arguments name, with its keys; what else sft.sbatch and sft.py take is left out.

    Raises:
        RecipeError: what `check.py` would say.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--recipe")
    for name in ("--strategy", "--resume", "--allow_change", "--allow-change", "--callback"):
        parser.add_argument(name)
    parser.add_argument("--stop_at_step", "--stop-at-step")
    for name in ("--overwrite", "--profile"):
        parser.add_argument(name, action="store_true")
    args, overrides = parser.parse_known_args(words)
    return load.load(args.recipe, overrides)


def _element(number: int, file: Path, words: list[str]) -> list[str]:
    """The arguments of one run of a sweep, or of a rung of it (`--rung`), with `words`; none where it has no place."""
    found = sweep.read_sweep(file)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--rung", type=int, default=0)
    args, overrides = parser.parse_known_args(words)
    rungs = found.rungs(recipe_of([*found.runs[0], *overrides]))
    if not 0 <= args.rung < len(rungs):
        raise errors.RecipeError(
            f"rung {args.rung} of {len(rungs)}", where=str(file), help=f"{installation.command('submit')} --sweep FILE"
        )
    rung = rungs[args.rung]
    if not (run := sweep.find_run(found, rung, number)):
        print(f"nothing to do: fewer than {number + 1} runs have come to step {rung.before}", file=sys.stderr)
    return [*run, *overrides] if run else []


def decide_requeue(
    run: Path, restarts: int, cancelled: bool = False, max_restarts: int = MAX_RESTARTS
) -> tuple[str, str]:
    """Decide what becomes of a job whose ranks have ended, and why.

    Args:
        run: the run folder.
        restarts: how often the job was queued again.
        cancelled: Slurm ended it, which requeues by itself where it means to.

    Returns:
        `finished`, `again` (queue it again), `preempted` (a checkpoint stands, and a person starts it again),
        or `failed`; and the reason.
    """
    try:
        manifest = read_manifest(run, ("status",))
        if manifest["status"] == "preempted":
            read_manifest(run, ("progress.step", "progress.starts"))
    except ValueError as error:
        return "failed", f"{run / MANIFEST} cannot be used: {error}"
    status = manifest["status"]
    job = os.environ.get("SLURM_JOB_ID")
    if job and (manifest.get("slurm") or {}).get("job_id") != job:
        return "failed", f"{run} holds no run of job {job}: its start was refused"
    if status != "preempted":
        return ("finished" if status == "finished" else "failed"), f"the run is {status}"
    progress, step = manifest["progress"], manifest.get("totals", {}).get("steps", 0)
    if manifest.get("reached_stop"):
        return "finished", f"the run was to stop at step {step}"
    if cancelled:
        return "preempted", "the job was cancelled"
    if (run / STOP).exists():
        return "preempted", f"{run / STOP} ends the chain"
    if restarts >= max_restarts:
        return "preempted", f"it was started {restarts + 1} times (STEPLADDER_MAX_RESTARTS)"
    if progress["starts"] >= STUCK_AFTER and step <= progress["step"]:
        return "preempted", f"{STUCK_AFTER} starts in a row came no further than step {progress['step']}"
    return "again", f"preempted at step {step}"


def main() -> None:
    match sys.argv[1:]:
        case ["folder", *words]:
            recipe = recipe_of(words)
            staging.check_stage(recipe)
            console.write_exactly(f"{recipe.output_dir}\n")  # a name for a shell's variable
        case ["base", *words]:
            console.write_exactly(f"{recipe_of(words).get('model_name_or_path')}\n")
        case ["merge", *words]:
            recipe = recipe_of(words)
            if recipe.get("use_peft"):
                merge_it = start.merge_command(recipe.output_dir, recipe.values, f"{recipe.output_dir}/merged")
                console.write_exactly(f"{merge_it}\n")
        case ["held_out", *words]:
            recipe = recipe_of(words)
            if not (rows := mixture.name_held_out(recipe)):
                raise errors.DataError(
                    "the recipe holds out no rows, so its comparison could only be made on rows that are trained on",
                    where=recipe.where("eval_strategy"),
                    help="--test_split_size 0.1, or --eval_dataset_name FILE with --eval_strategy epoch",
                )
            print(rows)
        case ["element", number, file, *words] if number.isdecimal():
            # for sweep.sbatch; a value may hold any sign but NUL
            console.write_exactly("".join(f"{word}\0" for word in _element(int(number), Path(file), words)))
        case ["speed", run]:
            try:
                manifest = read_manifest(
                    Path(run), ("strategy", "totals.tokens_per_second", "totals.peak_memory_bytes.*")
                )
            except ValueError as error:
                fault = f"{Path(run) / MANIFEST} cannot be used: {error}"
                raise errors.RunError(fault, help="a run that is finished") from None
            totals = manifest["totals"]
            print(f"{manifest['strategy']:14} {totals['tokens_per_second'] or 0:>12,.0f} tokens/s  "
                  f"{max(totals['peak_memory_bytes']) / 2**30:6.2f} GiB a rank at most")  # fmt: skip
        case ["after", run, *flags]:
            counts = {"SLURM_RESTART_COUNT": "0", "STEPLADDER_MAX_RESTARTS": str(MAX_RESTARTS)}
            for name in counts:
                counts[name] = os.environ.get(name) or counts[name]
                if not counts[name].isdecimal():
                    raise errors.LaunchError(f"{name} is {counts[name]!r}, and must be a whole number")
            restarts, limit = map(int, counts.values())
            decided, why = decide_requeue(Path(run), restarts, "--cancelled" in flags, limit)
            print(f"{decided}: {why}", file=sys.stderr)
            print(decided)
        case _:
            raise errors.LaunchError(
                f"job: {' '.join(sys.argv[1:]) or 'nothing'} is no question of a job",
                help="folder, base, merge or held_out KEYS…; element NUMBER SWEEP; speed RUN; after RUN [--cancelled]",
            )


if __name__ == "__main__":
    errors.exit_with(main)
