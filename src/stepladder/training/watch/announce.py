"""The two blocks that frame a run: what will happen, and what happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepladder.console import quoted, say
from stepladder.errors import StepladderError
from stepladder.model import start
from stepladder.recipe.recipe import Recipe
from stepladder.run import Run


def beginning(
    run: Run, recipe: Recipe, steps: int | None, sequences: int | None, attention: str, notes: list[str]
) -> str:
    """What will happen, in one block before it does.

    Args:
        steps: of the whole run; and sequences of an epoch: None of a stream.
        attention: what computes it, and how rows lie.
    """
    f = run.manifest
    counts, origin = f["parameters"], f["starts_from"]
    data = ", ".join(f"{d['name']} ({d['rows']} rows)" for d in f["datasets"])
    ranks = f"{f['world_size']} rank{'s' * (f['world_size'] > 1)}"
    return "\n".join(
        (
            f"recipe      {f['recipe_name']} ({f['recipe_hash']}) → {run.folder}",
            f"ranks       {ranks} under {f['strategy']}: {', '.join(f['devices'])}",
            f"batch       {f['micro_batch_size']} micro-batch × {f['gradient_accumulation_steps']} accumulation "
            f"× {ranks} = {f['global_batch_size']} global{_unused(f)}",
            f"precision   {f['precision']}",
            f"attention   {attention}",
            f"parameters  {counts['trainable']:,} trainable of {counts['all']:,} "
            f"({100 * counts['trainable'] / counts['all']:.2f} %)",
            f"data        {data}",
            *(
                f"adapter     {origin[key]} is trained on; its base is {origin['base']}"
                for key in ("adapter",)
                if key in origin
            ),
            f"run         {_method(recipe)}, {steps} steps{_epochs(steps, sequences, f['global_batch_size'])}, "
            f"{_checkpoints(recipe)}",
            f"watch       {_watched(recipe, f['plan'])}",
            *(f"resumed     from step {r['step']}, {r['from']}" for r in f["resumed"][-1:]),
            *(f"note        {note}" for note in notes),
        )
    )


def _method(recipe: Recipe) -> str:
    if not recipe.get("use_peft"):
        return "full fine-tuning"
    kind = str(recipe.get("peft_type") or "lora")
    name = {"lora": "LoRA", "dora": "DoRA"}.get(kind, f"{kind} tuning")
    return f"{name} on 4-bit weights" if recipe.get("load_in_4bit") else name


def _epochs(steps: int | None, sequences: int | None, batch: int) -> str:
    return f" ({steps / math.ceil(sequences / batch):.3g} epochs)" if steps and sequences else ""


def _checkpoints(recipe: Recipe) -> str:
    every = {"no": "no checkpoints", "epoch": "a checkpoint each epoch", "best": "a checkpoint at each better loss"}
    strategy = str(getattr(recipe.get("save_strategy"), "value", recipe.get("save_strategy")))
    steps = recipe.get("save_steps")
    share = f"{100 * steps:g} % of the run" if steps < 1 else f"{steps:g} steps" if steps > 1 else "step"
    return every.get(strategy, f"a checkpoint every {share}")


def _watched(recipe: Recipe, plan: dict[str, Any]) -> str:
    """Where its figures go, and the memory that it is planned to take."""
    names = recipe.get("report_to") or []
    names = [names] if isinstance(names, str) else names
    told = ", ".join(["metrics.jsonl", *(name for name in names if name != "none")])
    memory = plan.get("peak_memory_bytes")
    return told + (f"; {memory / 2**30:.1f} GiB of tensors planned at most on a rank" if memory else "")


def _unused(f: dict[str, Any]) -> str:
    """Places of a step that no row takes, which cost time and change nothing."""
    places = f["micro_batch_size"] * f["gradient_accumulation_steps"] * f["world_size"]
    empty = places - f["global_batch_size"]
    return f", {empty} of {places} places empty (another per_device_train_batch_size may take none)" if empty else ""


def ending(run: Run) -> str:
    """What happened, and where it lies."""
    totals, last = run.manifest["totals"], run.manifest["final"]
    losses = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in last.items())  # none of a short run
    starts = len(run.manifest["resumed"]) + 1
    used = f", MFU {100 * totals['mfu']:.1f} %" if totals.get("mfu") else ""
    memory = max(totals["peak_memory_bytes"]) / 2**30
    best, folder = run.manifest["result_step"], quoted(run.folder)
    lines = [
        f"✔ {totals['steps']} steps in {totals['seconds']:.0f} s{losses}",
        f"  {totals['tokens_per_second'] or 0:,.0f} tokens/s{used}, {memory:.1f} GiB at most on a rank",
        f"  goodput {100 * totals['goodput']:.0f} %: {totals['seconds']:,.0f} s of steps in "
        f"{totals['seconds'] / totals['goodput']:,.0f} s" + (f" over {starts} starts" if starts > 1 else ""),
        *([f"  the result is step {best}, the best of the evaluations"] if best != totals["steps"] else []),
        f"  {run.folder}/ holds the result, run.json, metrics.jsonl and recipe.yaml; open report.html",
        f'  ask it:      python scripts/generate.py --model {folder} --prompt "…"',
    ]
    recipe = run.manifest["recipe"]
    base = quoted(recipe["model_name_or_path"])
    held_out = run.manifest.get("held_out", {"rows": 0, "foreign": ""})  # counted by the rank that writes
    if held_out["rows"]:
        lines.append(f"  compare it:  python scripts/compare.py --base {base} --tuned {folder}")
    if held_out["foreign"]:
        lines.append(f"  ⚠ it was evaluated on {held_out['foreign']}, which came with other training data")
    if recipe.get("use_peft") and recipe.get("peft_type", "lora") == "lora":  # virtual tokens cannot be merged
        lines.append(f"  merge it:    {start.merge_command(run.folder, recipe)}")
    return "\n".join(lines)


def written_beside(write: Callable[..., Any], folder: Path, *args: Any) -> None:
    """Write a page of a run that is finished. What goes wrong is said: the result stands without its page."""
    try:
        write(folder, *args)
    except Exception as error:
        cause = (
            f"{error.what}: {error.why}" if isinstance(error, StepladderError) else f"{type(error).__name__}: {error}"
        )
        say(f"⚠ the pages of {folder} are not whole: {cause}")
        say(f"  the result stands; for its page, once that is mended: python scripts/report.py {quoted(folder)}")


def preempted(run: Run) -> str:
    """That it stopped as it was asked to, and how to go on."""
    if not (steps := run.manifest["totals"]["steps"]):
        return "stopped before the first step: the same command again begins anew (exit code 75)"
    return f"stopped after step {steps}, and saved: the same command again goes on from there (exit code 75)"
