"""A run folder as others read it: its files' names, its manifest and its metrics, of which anything may be damaged."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stepladder.errors import LaunchError
from stepladder.files import open_file, parse_json, read_lines, read_object

MANIFEST, METRICS, RECIPE, LOCK = "run.json", "metrics.jsonl", "recipe.yaml", ".lock"
HELD_OUT_LOSSES = "held_out_losses.json"  # of each evaluated row
LARGEST = 1e100  # a logged value beyond it is no figure: its square would overflow
STUCK_AFTER = 3  # starts that came no further than one and the same step
NUMBER, NONE = (int, float), type(None)
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("status", "strategy", "precision", "wandb_run_id"), (str,)),
    **dict.fromkeys(("recipe", "progress", "totals", "final", "parameters", "plan", "packages", "samples"), (dict,)),
    **dict.fromkeys(("started_with", "inputs", "inputs.*"), (dict,)),
    "inputs.*.*": (str,),
    **dict.fromkeys(("resumed", "datasets", "samples.before", "samples.after"), (list,)),
    **dict.fromkeys(("progress.step", "progress.starts", "resumed.*.step", "world_size"), (int,)),
    **dict.fromkeys(("totals.steps", "totals.tokens", "totals.peak_memory_bytes.*"), (int,)),
    **dict.fromkeys(("parameters.all", "parameters.trainable"), (int,)),
    **dict.fromkeys(("elapsed_seconds", "totals.seconds", "totals.goodput", "final.loss", "final.eval_loss"), NUMBER),
    **dict.fromkeys(("resumed.*", "datasets.*"), (dict,)),
    **dict.fromkeys(("recipe.peft_type", "recipe.lr_scheduler_type"), (str, NONE)),
    "datasets.*.name": (str,),
    "datasets.*.rows": (int, str, NONE),  # of a stream they are not counted
    "global_batch_size": (int, NONE),
    "plan.peak_memory_bytes": (*NUMBER, NONE),
    "recipe.lora_r": (int, NONE),
    "slurm": (dict, NONE),
    "stopped_early": (dict,),
    **dict.fromkeys((f"stopped_early.{key}" for key in ("step", "of_steps", "evaluations", "patience")), (int,)),
    "stopped_early.metric": (str,),
    "stopped_early.best_step": (int, NONE),
    "stopped_early.threshold": NUMBER,
    **dict.fromkeys(("stopped_early.value", "stopped_early.best"), (*NUMBER, NONE)),
    "slurm.job_id": (str,),
    "slurm.restart_count": (int,),
    "totals.peak_memory_bytes": (list,),
    "totals.tokens_per_second": (*NUMBER, NONE),
}  # of a manifest, where anything reads it


def read_metrics(folder: Path, last: int = 0) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of metrics.jsonl, read one by one, each with its row (`parse_row`); none if there is no such file.

    Args:
        last: only the lines that begin in so many last bytes; 0 for all lines.

    Raises:
        LaunchError: it cannot be read.
    """
    file = folder / METRICS
    if not os.path.lexists(file):
        return
    try:
        with open_file(file) as stream:
            if last and stream.seek(0, os.SEEK_END) > last:
                stream.seek(-last, os.SEEK_END)
                stream.readline()
            else:
                stream.seek(0)
            for line in read_lines(stream):
                yield line, parse_row(line)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise LaunchError(f"{file} cannot be used: {why}", help="put it back from a copy, or remove it") from None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line of metrics.jsonl; None if it is damaged or incomplete."""
    try:
        row = parse_json(line.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_manifest(folder: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """A run's manifest, checked: the facts that the code reads are of the types that `sft.py` writes.

    Args:
        needed: facts that must be there, by the names of `KINDS`.

    Raises:
        ValueError: it is missing, damaged, lacks a fact, or holds one of another kind.
    """
    found = read_object(folder / MANIFEST)
    for name in needed:
        if not [*_values(found, name.split("."))]:
            raise ValueError(f"it holds no {name} as training writes it")
    for name, kinds in KINDS.items():
        for value in _values(found, name.split(".")):
            # To Python a bool is an int.
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"its {name} is {json.dumps(value)[:60]}, which training does not write")
    return found


def _values(found: Any, names: list[str]) -> Iterator[Any]:
    """The values at a dotted name, where `*` is each item of a list or an object."""
    if not names:
        yield found
    elif names[0] == "*":
        for item in found if isinstance(found, list) else found.values() if isinstance(found, dict) else ():
            yield from _values(item, names[1:])
    elif isinstance(found, dict) and names[0] in found:
        yield from _values(found[names[0]], names[1:])


def stop_reason(stopped: dict[str, Any]) -> str:
    """Where and why early stopping ended a run, from the `stopped_early` of its manifest."""
    best, times = stopped["best"], stopped["evaluations"]
    limit = "a finite number" if best is None else f"better than {best:.4f} (step {stopped['best_step']})"
    if stopped["threshold"] and best is not None:
        limit += f" by more than {stopped['threshold']:g}"
    return (
        f"stopped early after step {stopped['step']} of {stopped['of_steps']}: {stopped['metric']} was not {limit} in "
        f"{times} evaluation{'s' * (times != 1)} in a row"
    )


def status(folder: Path) -> str:
    try:
        return str(read_object(folder / MANIFEST)["status"])
    except (ValueError, KeyError):
        return "unreadable"
