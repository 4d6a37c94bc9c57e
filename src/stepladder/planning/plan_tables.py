"""What plan.py prints: the strategies of a recipe on some GPUs, or how the recipe scales over more; tables or JSON.

Scaling keeps each GPU's rows, as in the published tables that it is compared with (docs/planning.md), so that the
global batch grows with the GPUs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from stepladder.data import mixture
from stepladder.data.rows import Stream
from stepladder.errors import DataError, LaunchError
from stepladder.hardware import GIB, GPU
from stepladder.planning import choose, speed
from stepladder.planning.choose import STRATEGIES, Candidate, Plan
from stepladder.planning.speed import ETHERNET, INFINIBAND, Network, Step
from stepladder.recipe.recipe import Recipe
from stepladder.screen import Screen
from stepladder.training.launch.launcher import Strategy, settle_strategy

PARTS = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ", "loss": "loss",
    "communication": "comm", "overhead": "fixed", "loading": "load",
}  # fmt: skip
SCALED_STRATEGIES = tuple(map(Strategy, ("ddp", "zero3", "fsdp", "hsdp")))
NODE = 8  # GPUs of a full node
BENDS = 0.9  # of one GPU's speed: below it, more GPUs are paid for than used


def print_candidates(
    plan: Plan, candidates: list[Candidate], best: Candidate | None, steps: int | None, parts: bool = False
) -> None:
    """Print the peak per rank (GiB), the room left and the speed of each candidate; the best one is marked.

    Args:
        steps: optimizer steps of the whole run, where known.
        parts: print a second table with the parts of the peak.
    """
    tokens = (steps or 0) * plan.rows * plan.length
    screen = Screen(plain=100)
    screen.print(
        f"{plan.ranks} × {plan.device.name}, {plan.rows} rows of {plan.length} tokens a step, {plan.precision}; "
        "GiB a rank"
    )
    decides = _table("ckpt", "batch", "peak", "fits", "host", "tokens/s", "hours")
    split = _table("ckpt", *PARTS.values())
    for candidate in candidates:
        name = ("▸ " if candidate is best else "  ") + candidate.strategy
        style, checkpointing = None if candidate.fits else "dim", "on" if candidate.checkpointing else "off"
        room = (candidate.limit - candidate.memory.total) / GIB
        host = f"{candidate.memory.host / GIB:.1f}" + ("" if candidate.host_fits else " ✘")
        decides.add_row(
            name, checkpointing, str(candidate.micro), f"{candidate.memory.total / GIB:.1f}",
            ("✔" if candidate.fits else "✘") + f" {room:+.1f}", host, f"{candidate.tokens_per_second:,.0f}",
            _hours(tokens / candidate.tokens_per_second) if steps else "?", style=style,
        )  # fmt: skip
        held = [f"{getattr(candidate.memory, part) / GIB:.1f}" for part in PARTS]
        split.add_row(name, checkpointing, *held, style=style)
    screen.print(decides)
    if parts:
        screen.print(split)
        screen.print("fixed: the CUDA context; load: what loading the model takes beyond a step")
    if any(one.memory.loading for one in candidates):
        screen.print("peak: while the base loads, which each GPU quantizes whole before a strategy shards it")
    known = f"it has {plan.host / GIB:.0f}" if plan.host else "--host_memory says what it has"
    run = f"{steps} steps" if steps else "an unknown number of steps (the data set is not here; --max_steps says it)"
    screen.print(
        f"the whole run: {run}; its hours are at most these, since rows are seldom full\n"
        "host: GiB of a node's memory, while the model loads, or for what is offloaded and a copy of what a checkpoint "
        f"holds; {known}\n"
        "assumed: every row full and every token trained, flash or fused attention, the optimizer's state there; "
        f"the allocator wastes 5 %; {speed.EFFICIENCY:.0%} of the GPU's peak is reached, {speed.SHARDED:.0%} "
        "under ZeRO and FSDP (published runs: 33 to 56 %)"
    )
    if plan.nodes > 1 and best is not None:
        screen.print(_compare_networks(plan, candidates, best))


def _compare_networks(plan: Plan, candidates: list[Candidate], best: Candidate) -> str:
    """Which strategy is the fastest over a slow network between the nodes, and the recommended one's speed there."""

    def over_ethernet(one: Candidate) -> float:
        words = (one.strategy, one.micro, one.checkpointing, one.accumulation, plan.ranks, plan.nodes)
        return one.tokens_per_second * plan.step(*words).total / plan.step(*words, ETHERNET).total

    rates = {one: over_ethernet(one) for one in candidates if one.fits}
    fastest = max(rates, key=lambda one: rates[one])
    other = f", {best.strategy} {rates[best]:,.0f}" if fastest.strategy != best.strategy else ""
    return (
        f"between the nodes: {INFINIBAND.name}; over {ETHERNET.name}, the fastest is {fastest.strategy}: "
        f"{rates[fastest]:,.0f} tokens/s{other}"
    )


def _table(*columns: str) -> Table:
    """An empty table of at most 80 columns: rules between them would not leave room for the figures."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("strategy", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}" if seconds > 360 else f"{seconds / 3600:.2g}"


def print_plan(args: argparse.Namespace, overrides: list[str], recipe: Recipe, device: GPU) -> None:
    """Print what plan.py is asked for.

    Args:
        args: plan.py's flags.
        overrides: the recipe's keys on its command line, which the command to type repeats.

    Raises:
        LaunchError: no such strategy, it is none for these GPUs, or none fits.
    """
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
        points = scale(plan, parse_counts(args.scale), micro, checkpointing)
        if args.json:
            print(json.dumps({"scale": [point.as_json() for point in points]}))
        else:
            print_scale(plan, points, micro, checkpointing, args.parts)
        return
    asked = settle_strategy(Strategy(args.strategy), args.nodes, args.gpus) if args.strategy else None
    candidates = plan.all_candidates(asked) if asked else plan.candidates()
    best = plan.best(candidates)
    steps = choose.steps(recipe, _rows(recipe), plan.rows)
    if args.json:
        rows = [choose.as_json(one) for one in candidates]
        commands = choose.command(args.recipe, overrides, plan, best) if best else None
        chosen = choose.as_json(best) if best else None
        print(json.dumps({"ways": rows, "recommended": chosen, "commands": commands, "steps": steps}))
    else:
        print_candidates(plan, candidates, best, steps, args.parts)
    if best is None:
        raise choose.no_fit_error(plan, candidates)
    if not args.json:
        print("\n" + "\n".join(choose.command(args.recipe, overrides, plan, best)))


def _rows(recipe: Recipe) -> int | None:
    """The number of training rows; None if the data is missing or streamed."""
    try:
        train = mixture.load(recipe)[0]
    except DataError:
        return None
    return None if isinstance(train, Stream) else len(train)


@dataclass(frozen=True)
class Point:
    """A strategy on `gpus` GPUs, with its step over each network."""

    strategy: str
    gpus: int
    nodes: int
    rows: int
    on: dict[Network, Step]

    def efficiency(self, network: Network) -> float:
        """The speed per GPU, as a part of that of a GPU alone."""
        return self.on[network].compute / self.on[network].total

    def as_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "gpus": self.gpus,
            "nodes": self.nodes,
            "rows": self.rows,
            "networks": {
                network.name: {
                    "compute_seconds": step.compute,
                    "collective_seconds": step.collectives,
                    "step_seconds": step.total,
                    "efficiency": self.efficiency(network),
                }
                for network, step in self.on.items()
            },
        }


def parse_counts(text: str) -> list[int]:
    """The numbers of GPUs in `8,64,512`.

    Raises:
        LaunchError: it is no such list, or a number is no whole nodes.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise LaunchError(f"--scale {text}: numbers of GPUs", where="command line", help="--scale 8,64,512")
    numbers = sorted({int(word) for word in words})
    if odd := [number for number in numbers if number > NODE and number % NODE]:
        raise LaunchError(
            f"{odd[0]} GPUs do not fill nodes of {NODE}", where="command line --scale", help="--scale 8,64,512"
        )
    return numbers


def scale(plan: Plan, gpus: list[int], micro: int, checkpointing: bool) -> list[Point]:
    """Each strategy on each number of GPUs, with one GPU's micro-batch and accumulation."""
    accumulation = max(1, plan.rows // plan.ranks // micro)
    found = []
    for strategy in SCALED_STRATEGIES:
        for count in gpus:
            nodes = -(-count // NODE)
            on = {
                network: plan.step(strategy, micro, checkpointing, accumulation, count, nodes, network)
                for network in (INFINIBAND, ETHERNET)
            }
            found.append(Point(strategy, count, nodes, count * micro * accumulation, on))
    return found


def print_scale(plan: Plan, found: list[Point], micro: int, checkpointing: bool, parts: bool = False) -> None:
    """Print the table, and for each strategy the number of GPUs at which it loses speed.

    Args:
        parts: print the seconds of each collective too.
    """
    screen = Screen(plain=100)
    screen.print(
        f"{plan.device.name}, {NODE} a node; micro-batch {micro} of {plan.length} tokens, checkpointing "
        f"{'on' if checkpointing else 'off'}: seconds of a step; tokens/s of a GPU"
    )
    collectives = ("all-gather", "reduce-scatter", "all-reduce")
    table = _table("GPUs", "rows", "compute", "exposed", "tokens/s", "InfiniBand", "Ethernet")
    split = _table("GPUs", *collectives)
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
        screen.print(f"{strategy}: {'; '.join(_bend(found, strategy, network) for network in (INFINIBAND, ETHERNET))}")
    screen.print(
        f"assumed: {plan.device.link:g} GB/s between the GPUs of a node, {INFINIBAND.name}, {ETHERNET.name}, of which "
        f"{speed.REACHED:.0%} is reached; what fits behind arithmetic costs nothing. One GPU's rows stay, so the "
        f"global batch grows: the recipe's own {plan.rows} rows keep {plan.rows} GPUs busy at most"
    )


def _bend(found: list[Point], strategy: str, network: Network) -> str:
    """The first number of GPUs at which a tenth of the speed is lost."""
    kind = network.name.partition(",")[0]
    lost = [p for p in found if p.strategy == strategy and p.efficiency(network) < BENDS]
    if not lost:
        return f"over {kind} no bend"
    step = lost[0].on[network]
    most = max(step.collectives, key=lambda name: step.collectives[name])
    return f"over {kind} it bends at {lost[0].gpus} GPUs ({most} {step.collectives[most]:.2f} s)"
