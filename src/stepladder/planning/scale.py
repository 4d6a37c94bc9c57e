"""A recipe on more and more GPUs, on paper: what a step computes, what it sends, and where it bends.

Each GPU keeps its rows, as in the published tables that this is held against (docs/planning.md), so
that the global batch grows with the GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepladder.errors import LaunchError
from stepladder.planning import report, speed
from stepladder.planning.choose import Plan
from stepladder.planning.speed import ETHERNET, INFINIBAND, Network, Step
from stepladder.screen import Screen

STRATEGIES = ("ddp", "zero3", "fsdp", "hybrid")
NODE = 8  # GPUs of a full node
BENDS = 0.9  # of one GPU's speed: below it, more GPUs are paid for than used


@dataclass(frozen=True)
class Point:
    """A strategy on so many GPUs, over both networks."""

    strategy: str
    gpus: int
    nodes: int
    rows: int
    on: dict[Network, Step]

    def efficiency(self, network: Network) -> float:
        """Of the speed that each GPU would have alone."""
        return self.on[network].compute / self.on[network].total


def counts(text: str) -> list[int]:
    """`8,64,512`.

    Raises:
        LaunchError: it is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise LaunchError(f"--scale {text}: numbers of GPUs", where="command line", help="--scale 8,64,512")
    numbers = sorted({int(word) for word in words})
    if odd := [number for number in numbers if number > NODE and number % NODE]:
        raise LaunchError(
            f"{odd[0]} GPUs are no whole nodes of {NODE}", where="command line --scale", help="--scale 8,64,512"
        )
    return numbers


def points(plan: Plan, gpus: list[int], micro: int, checkpointing: bool) -> list[Point]:
    """Every strategy on every number of GPUs, with the micro-batch and accumulation that one GPU has."""
    accumulation = max(1, plan.rows // plan.ranks // micro)
    found = []
    for strategy in STRATEGIES:
        for count in gpus:
            nodes = -(-count // NODE)
            on = {
                network: plan.step(strategy, micro, checkpointing, accumulation, count, nodes, network)
                for network in (INFINIBAND, ETHERNET)
            }
            found.append(Point(strategy, count, nodes, count * micro * accumulation, on))
    return found


def write(plan: Plan, found: list[Point], micro: int, checkpointing: bool, parts: bool = False) -> None:
    """The table, and a sentence for each strategy: where it bends.

    Args:
        parts: the seconds of each collective too.
    """
    screen = Screen(plain=100)
    screen.print(
        f"{plan.device.name}, {NODE} a node; micro-batch {micro} of {plan.length} tokens, checkpointing "
        f"{'on' if checkpointing else 'off'}: seconds of a step; tokens/s of a GPU"
    )
    collectives = ("all-gather", "reduce-scatter", "all-reduce")
    table = report.table("GPUs", "rows", "compute", "exposed", "tokens/s", "InfiniBand", "Ethernet")
    split = report.table("GPUs", *collectives)
    for point in found:
        step = point.on[INFINIBAND]
        sent = [step.collectives.get(name, 0.0) for name in collectives]
        exposed = step.total - step.compute
        tokens = point.rows * plan.length / point.gpus / step.total
        shares = [f"{point.efficiency(network):.0%}" for network in (INFINIBAND, ETHERNET)]
        table.add_row(
            point.strategy, str(point.gpus), str(point.rows), f"{step.compute:.3f}",
            f"{exposed:.3f}", f"{tokens:,.0f}", *shares,
        )  # fmt: skip
        split.add_row(point.strategy, str(point.gpus), *(f"{seconds:.3f}" if seconds else "" for seconds in sent))
    screen.print(table)
    if parts:
        screen.print(split)
    for strategy in dict.fromkeys(point.strategy for point in found):
        screen.print(f"{strategy}: {'; '.join(bend(found, strategy, network) for network in (INFINIBAND, ETHERNET))}")
    screen.print(
        f"assumed: {plan.device.link:g} GB/s between the GPUs of a node, {INFINIBAND.name}, {ETHERNET.name}, of which "
        f"{speed.REACHED:.0%} is reached; what fits behind arithmetic costs nothing. One GPU's rows stay, so the "
        f"global batch grows: the recipe's own {plan.rows} rows keep {plan.rows} GPUs busy at most"
    )


def bend(found: list[Point], strategy: str, network: Network) -> str:
    """The first number of GPUs at which a tenth is lost."""
    kind = network.name.partition(",")[0]
    lost = [p for p in found if p.strategy == strategy and p.efficiency(network) < BENDS]
    if not lost:
        return f"over {kind} no bend"
    step = lost[0].on[network]
    most = max(step.collectives, key=lambda name: step.collectives[name])
    return f"over {kind} it bends at {lost[0].gpus} GPUs ({most} {step.collectives[most]:.2f} s)"


def as_json(found: list[Point]) -> list[dict[str, Any]]:
    return [
        {
            "strategy": point.strategy,
            "gpus": point.gpus,
            "nodes": point.nodes,
            "rows": point.rows,
            "networks": {
                network.name: {
                    "compute_seconds": step.compute,
                    "collective_seconds": step.collectives,
                    "step_seconds": step.total,
                    "efficiency": point.efficiency(network),
                }
                for network, step in point.on.items()
            },
        }
        for point in found
    ]
