"""A plan as a table, with what it assumes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from stepladder.planning import speed
from stepladder.planning.choose import Plan, Way
from stepladder.planning.hardware import GIB

PARTS = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ", "loss": "loss",
    "communication": "comm", "overhead": "fixed",
}  # fmt: skip


def write(plan: Plan, ways: list[Way], best: Way | None, steps: int | None) -> None:
    """Print each way's peak a rank in GiB, split, its speed, and the recommended one marked.

    Args:
        steps: of the whole run, where that is known.
    """
    tokens = (steps or 0) * plan.rows * plan.length
    table = Table(
        title=f"{plan.ranks} × {plan.device.name}, {plan.rows} rows of {plan.length} tokens a step, "
        f"{plan.precision}: GiB a rank",
        title_justify="left",
    )
    for name in ("strategy", "ckpt", "batch", "peak", *PARTS.values(), "host/node", "fits", "tokens/s", "hours"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for way in ways:
        parts = [f"{getattr(way.memory, name) / GIB:.1f}" for name in PARTS]
        parts.append(f"{way.memory.host * plan.ranks / plan.nodes / GIB:.1f}")
        room = (way.limit - way.memory.total) / GIB
        table.add_row(
            ("▸ " if way is best else "  ") + way.strategy, "on" if way.checkpointing else "off", str(way.micro),
            f"{way.memory.total / GIB:.1f}", *parts, ("✔" if way.fits else "✘") + f" {room:+.1f}",
            f"{way.tokens_per_second:,.0f}", hours(tokens / way.tokens_per_second) if steps else "?",
            style=None if way.fits else "dim",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 140).print(table)
    run = f"{steps} steps" if steps else "an unknown number of steps (the data set is not here; --max_steps says it)"
    print(
        f"the whole run: {run}; its hours are at most these, since rows are seldom full\n"
        "assumed: every row full and every token trained, flash or fused attention, the optimizer's state there; "
        f"the allocator wastes 5 %;\n{speed.EFFICIENCY:.0%} of the GPU's peak is reached (published runs: 33 to 56 %)"
    )


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}" if seconds > 360 else f"{seconds / 3600:.2g}"
