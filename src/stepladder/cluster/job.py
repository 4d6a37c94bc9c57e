"""What a batch script asks Stepladder: where the run lies, what to run, and whether the job is to be queued again.

    python -m stepladder.cluster.job folder --recipe lora --max_steps 20     (base, held_out, merge too)
    python -m stepladder.cluster.job element slurm/sweeps/lora_rank.yaml 0
    python -m stepladder.cluster.job after runs/lora

Light, since it runs on every start: no torch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from stepladder import console, errors, files
from stepladder.cluster import staging
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
    for name in ("--overwrite", "--profile"):
        parser.add_argument(name, action="store_true")
    args, overrides = parser.parse_known_args(words)
    return load.load(args.recipe, overrides)


def sweep_elements(file: Path) -> list[list[str]]:
    """The arguments of each run of a sweep, in the order of the array's elements: every combination of the grid.

    recipe: lora
    strategy: ddp          # optional
    max_steps: 60          # any key, the same for all
    grid:
      lora_r: [8, 16, 32, 64]

    Raises:
        RecipeError: the file is no sweep.
    """
    try:
        sweep = files.parse_yaml(files.read_text(file, files.YAML_BYTES))
    except ValueError as error:
        raise errors.RecipeError(f"not a sweep: {error}", where=str(file)) from None
    grid = sweep.get("grid") if isinstance(sweep, dict) else None
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise errors.RecipeError(
            "a sweep has a recipe and a grid: a list of values for each key that varies",
            where=str(file),
            help="recipe: lora\ngrid:\n  lora_r: [8, 16, 32, 64]",
        )
    if not isinstance(sweep.get("recipe"), str):
        raise errors.RecipeError("a sweep names its recipe", where=str(file), help="recipe: lora")
    if twice := set(grid) & set(sweep):
        raise errors.RecipeError(f"{', '.join(sorted(twice))} is in the grid and beside it", where=str(file))
    same = {key: value for key, value in sweep.items() if key not in ("grid", "output_dir")}
    root = Path(sweep.get("output_dir") or f"runs/{file.stem}")
    elements = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_text(value)}".replace("/", "_") for key, value in varied.items())
        keys = {**same, **varied, "output_dir": root / name}
        elements.append([word for key, value in keys.items() for word in (f"--{key}", _text(value))])
    return elements


def sweep_folders(file: Path) -> list[str]:
    """The run folder of each element."""
    return [words[words.index("--output_dir") + 1] for words in sweep_elements(file)]


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


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
        case ["element", file, number] if number.isdecimal():
            elements = sweep_elements(Path(file))
            if int(number) >= len(elements):
                raise errors.RecipeError(f"element {number} of a sweep of {len(elements)}", where=file,
                                         help=f"sbatch --array=0-{len(elements) - 1} …")  # fmt: skip
            # for sweep.sbatch; a value may hold any sign but NUL
            console.write_exactly("".join(f"{word}\0" for word in elements[int(number)]))
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
                help="folder, base, merge or held_out KEYS…; element SWEEP NUMBER; speed RUN; after RUN [--cancelled]",
            )


if __name__ == "__main__":
    errors.exit_with(main)
