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


def write(plan: Plan, ways: list[Way], best: Way | None) -> None:
    """Print each way's peak a rank in GiB, split, and the recommended one marked."""
    table = Table(
        title=f"{plan.ranks} × {plan.device.name}, {plan.rows} rows of {plan.length} tokens a step, "
        f"{plan.precision}: GiB a rank",
        title_justify="left",
    )
    for name in ("strategy", "ckpt", "batch", "peak", *PARTS.values(), "host", "fits", "tokens/s"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for way in ways:
        parts = [f"{getattr(way.memory, name) / GIB:.1f}" for name in (*PARTS, "host")]
        room = (way.limit - way.memory.total) / GIB
        table.add_row(
            ("▸ " if way is best else "  ") + way.strategy, "on" if way.checkpointing else "off", str(way.micro),
            f"{way.memory.total / GIB:.1f}", *parts, ("✔" if way.fits else "✘") + f" {room:+.1f}",
            f"{way.tokens_per_second:,.0f}", style=None if way.fits else "dim",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 130).print(table)
    print(
        "assumed: every row full and every token trained, flash or fused attention, the optimizer's state there; "
        f"the allocator wastes 5 %;\n{speed.EFFICIENCY:.0%} of the GPU's peak is reached (published runs: 33 to 56 %)"
    )
