"""A plan as a table, with what it assumes."""

from __future__ import annotations

import argparse
import json

from rich import box
from rich.table import Table

from stepladder.data import mixture
from stepladder.data.rows import Stream
from stepladder.errors import DataError, LaunchError
from stepladder.planning import choose, speed
from stepladder.planning.choose import STRATEGIES, Plan, Way
from stepladder.planning.hardware import GIB, GPU
from stepladder.recipe.recipe import Recipe
from stepladder.screen import Screen

PARTS = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ", "loss": "loss",
    "communication": "comm", "overhead": "fixed", "loading": "load",
}  # fmt: skip


def write(plan: Plan, ways: list[Way], best: Way | None, steps: int | None, parts: bool = False) -> None:
    """Print each way's peak per rank in GiB, its room, and its speed, the recommended one marked.

    Args:
        steps: of the whole run, where that is known.
        parts: a second table splits the peak.
    """
    tokens = (steps or 0) * plan.rows * plan.length
    screen = Screen(plain=100)
    screen.print(
        f"{plan.ranks} × {plan.device.name}, {plan.rows} rows of {plan.length} tokens a step, {plan.precision}; "
        "GiB a rank"
    )
    decides = table("ckpt", "batch", "peak", "fits", "host", "tokens/s", "hours")
    split = table("ckpt", *PARTS.values())
    for way in ways:
        name = ("▸ " if way is best else "  ") + way.strategy
        style, checkpointing = None if way.fits else "dim", "on" if way.checkpointing else "off"
        room = (way.limit - way.memory.total) / GIB
        host = f"{way.memory.host / GIB:.1f}" + ("" if way.host_fits else " ✘")
        decides.add_row(
            name, checkpointing, str(way.micro), f"{way.memory.total / GIB:.1f}",
            ("✔" if way.fits else "✘") + f" {room:+.1f}", host, f"{way.tokens_per_second:,.0f}",
            hours(tokens / way.tokens_per_second) if steps else "?", style=style,
        )  # fmt: skip
        held = [f"{getattr(way.memory, part) / GIB:.1f}" for part in PARTS]
        split.add_row(name, checkpointing, *held, style=style)
    screen.print(decides)
    if parts:
        screen.print(split)
        screen.print("fixed: the CUDA context; load: what loading the model takes beyond a step")
    if any(way.memory.loading for way in ways):
        screen.print("peak: while the base loads, which each GPU quantizes whole before a strategy shards it")
    known = f"it has {plan.host / GIB:.0f}" if plan.host else "--host_memory says what it has"
    run = f"{steps} steps" if steps else "an unknown number of steps (the data set is not here; --max_steps says it)"
    screen.print(
        f"the whole run: {run}; its hours are at most these, since rows are seldom full\n"
        f"host: GiB of a node's memory, while the model loads or for what is offloaded; {known}\n"
        "assumed: every row full and every token trained, flash or fused attention, the optimizer's state there; "
        f"the allocator wastes 5 %; {speed.EFFICIENCY:.0%} of the GPU's peak is reached, {speed.SHARDED:.0%} "
        "under ZeRO and FSDP (published runs: 33 to 56 %)"
    )


def table(*columns: str) -> Table:
    """Of at most 80 columns: rules between all columns would not leave room for the figures."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("strategy", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}" if seconds > 360 else f"{seconds / 3600:.2g}"


def answer(args: argparse.Namespace, recipe: Recipe, device: GPU) -> None:
    """What plan.py prints: the strategies of a recipe on some GPUs, or how it scales.

    Args:
        args: plan.py's flags.

    Raises:
        LaunchError: no such strategy, or none fits.
    """
    from stepladder.planning import scale  # which prints by this module's tables

    if args.strategy not in (None, *STRATEGIES):
        raise LaunchError(
            f"unknown strategy '{args.strategy}'",
            where="command line --strategy",
            help=f"one of {', '.join(STRATEGIES)}",
        )
    host = args.host_memory and args.host_memory * GIB
    plan = Plan(recipe, args.nodes, args.gpus, device, host=host)
    if args.scale:
        micro, checkpointing = plan.one_micro_batch()
        points = scale.points(plan, scale.counts(args.scale), micro, checkpointing)
        if args.json:
            print(json.dumps({"scale": scale.as_json(points)}))
        else:
            scale.write(plan, points, micro, checkpointing, args.parts)
        return
    ways = plan.each(args.strategy) if args.strategy else plan.ways()
    best = plan.best(ways)
    steps = choose.steps(recipe, _rows(recipe), plan.rows)
    if args.json:
        rows = [choose.as_json(way) for way in ways]
        commands = choose.command(args.recipe, plan, best) if best else None
        chosen = choose.as_json(best) if best else None
        print(json.dumps({"ways": rows, "recommended": chosen, "commands": commands, "steps": steps}))
    else:
        write(plan, ways, best, steps, args.parts)
    if best is None:
        raise choose.nowhere(plan, ways)
    if not args.json:
        print("\n" + "\n".join(choose.command(args.recipe, plan, best)))


def _rows(recipe: Recipe) -> int | None:
    """How many rows the recipe trains on; None where they are not here, or nobody knows."""
    try:
        train = mixture.load(recipe)[0]
    except DataError:
        return None
    return None if isinstance(train, Stream) else len(train)
