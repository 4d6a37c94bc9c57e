"""Every way to run a recipe on given hardware, what it needs, and which one is best."""

from __future__ import annotations

import functools
import resource
from dataclasses import dataclass
from typing import Any

from stepladder.errors import LaunchError
from stepladder.hardware import GPU, GPUS
from stepladder.planning import hardware, memory, speed, trace
from stepladder.planning.hardware import GIB
from stepladder.planning.memory import Memory
from stepladder.recipe import batch
from stepladder.settings import Settings

# The simplest first: it is taken where two are equally fast.
STRATEGIES = ("single", "ddp", "zero2", "fsdp", "zero3", "fsdp_offload", "zero3_offload")


@dataclass(frozen=True)
class Way:
    """A strategy with a micro-batch: a row of the table."""

    strategy: str
    micro: int
    accumulation: int
    checkpointing: bool
    memory: Memory
    limit: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit


class Plan:
    """A recipe on so many nodes of so many GPUs."""

    def __init__(self, settings: Settings, nodes: int, gpus: int, device: GPU):
        if nodes < 1 or gpus < 1:
            raise LaunchError(
                f"{nodes} nodes with {gpus} GPUs train nothing", where="command line", way_out="--nodes 1 --gpus 1"
            )
        self.settings, self.nodes, self.ranks, self.device = settings, nodes, nodes * gpus, device
        self.config = hardware.config(settings)
        fixed = settings.get("bf16")
        self.precision = "fp32" if fixed is False and not settings.get("fp16") else ("bf16" if device.bf16 else "fp16")
        length = settings.get("max_length") or 1024
        self.length = min(length, getattr(self.config, "max_position_embeddings", None) or length)
        own = settings.get("per_device_train_batch_size") * settings.get("gradient_accumulation_steps") * self.ranks
        self.rows = settings.get("global_batch_size") or own
        batch.layout(self.rows, 1, self.ranks, settings.where("global_batch_size"))  # raises where rows < ranks

    def ways(self, strategies: tuple[str, ...] = STRATEGIES) -> list[Way]:
        """For each strategy, without and with checkpointing, the largest micro-batch that fits, or the smallest."""
        found = []
        for strategy in strategies:
            alone = strategy == "single" or strategy.endswith("offload")  # one rank has nothing to shard over
            if alone if self.ranks == 1 else strategy != "single":
                for checkpointing in (False, True):
                    tried = [self.way(strategy, micro, checkpointing) for micro in self.micros()]
                    found.append(next((way for way in reversed(tried) if way.fits), tried[0]))
        return found

    def micros(self) -> list[int]:
        most = self.rows // self.ranks
        return [micro for micro in (1, 2, 4, 8, 16, 32, 64) if micro <= most]

    def way(self, strategy: str, micro: int, checkpointing: bool) -> Way:
        step = batch.layout(self.rows, micro, self.ranks)
        traced = self._traced(micro, checkpointing, memory.casts(strategy) and self.precision != "fp32")
        overhead = hardware.CONTEXT + (hardware.NCCL if self.ranks > 1 else 0)
        need = memory.estimate(
            traced, self.settings, self.config, strategy, self.ranks, step.accumulation > 1, overhead
        )
        fast = speed.tokens_per_second(
            traced, self.config, strategy, self.ranks, self.nodes, step.accumulation, self.device,
            full=not self.settings.get("use_peft"), quantized=bool(self.settings.get("load_in_4bit")),
        ) * self.rows / step.places  # fmt: skip
        limit = self.device.memory * GIB / (1 + hardware.ALLOCATOR)
        return Way(strategy, micro, step.accumulation, checkpointing, need, limit, fast)

    def best(self, ways: list[Way]) -> Way | None:
        """The fastest that fits, offloading only where nothing else does; of equally fast ones the simplest."""

        def order(way: Way) -> tuple[bool, int, int]:
            return way.strategy.endswith("offload"), -round(way.tokens_per_second), STRATEGIES.index(way.strategy)

        return min((way for way in ways if way.fits), key=order, default=None)

    @functools.cache  # noqa: B019 - a plan lives as long as its script
    def _traced(self, micro: int, checkpointing: bool, cast: bool) -> trace.Traced:
        if micro > 4:  # padded batches grow by the same amount with every row
            two, four = (self._traced(n, checkpointing, cast) for n in (2, 4))
            return four.drawn_on(two, (micro - 4) / 2, micro)
        work = trace.Work(micro, self.length, self.precision, checkpointing, cast, gpu=True)
        return trace.of(self.settings, self.config, work)


def of_run(
    settings: Settings, strategy: str, step: batch.Layout, precision: str, longest: int | None, gpu: bool
) -> dict[str, Any]:
    """What a run that begins now will hold, for its run.json: as `totals.peak_memory_bytes` measures it.

    On a GPU that is PyTorch's tensors; on a CPU the resident set, so that what the process holds
    already is the fixed part.

    Args:
        longest: tokens of the longest row.
    """
    config = hardware.config(settings)
    if not gpu and strategy == "fsdp_offload":
        strategy = "fsdp"  # the shards lie in host memory anyhow (training/ranks.py)
    most = getattr(config, "max_position_embeddings", None) or 1024
    length = min(longest or settings.get("max_length") or most, most)
    checkpointing = bool(settings.get("gradient_checkpointing") or settings.get("activation_checkpointing"))
    work = trace.Work(step.micro, length, precision, checkpointing, memory.casts(strategy), gpu)
    overhead = 0 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    traced = trace.of(settings, config, work)
    need = memory.estimate(traced, settings, config, strategy, step.ranks, step.accumulation > 1, overhead)
    parts = {f"{name}_bytes": round(value) for name, value in vars(need).items()}
    return {"peak_memory_bytes": round(need.total), "tokens_a_row": length, "memory": parts}


def nowhere(plan: Plan, ways: list[Way]) -> LaunchError:
    """That nothing fits, the smallest hardware that would do, and what to change."""
    least = min(ways, key=lambda way: way.memory.total)
    need = least.memory.total * (1 + hardware.ALLOCATOR) / GIB
    enough = sorted((d for d in GPUS if d.memory >= need), key=lambda d: d.memory)
    gpus = f"{plan.ranks} × {enough[0].name} ({enough[0].memory:.0f} GiB)" if enough else "more GPUs, to shard over"
    ways_out = [f"{gpus}: the least that would do, under {least.strategy}"]
    if not plan.settings.get("use_peft"):
        ways_out.append("--use_peft true: an adapter has a hundredth of the gradients and optimizer states")
    elif not plan.settings.get("load_in_4bit"):
        ways_out.append("--load_in_4bit true: the frozen weights take a quarter of their bf16 size")
    if plan.length > 512:
        ways_out.append(f"--max_length {plan.length // 2}: half of the activations")
    return LaunchError(
        f"no way fits into {plan.ranks} × {plan.device.name}: the least needs {need:.1f} GiB a GPU, "
        f"and one has {plan.device.memory:.1f}",
        why=f"{least.strategy}, micro-batch {least.micro}, checkpointing {'on' if least.checkpointing else 'off'}",
        way_out="\n".join(ways_out),
    )


def command(recipe: str, plan: Plan, way: Way) -> tuple[str, str]:
    """What to type: on the machine, and for Slurm."""
    keys = f"--recipe {recipe} --per_device_train_batch_size {way.micro}"
    keys += f" --gradient_checkpointing {str(way.checkpointing).lower()}"
    several = f" --num_machines {plan.nodes} --machine_rank 0 --main_process_ip HOST --main_process_port 29500"
    launch = f"accelerate launch --config_file accelerate_configs/{way.strategy}.yaml"
    launch += (several if plan.nodes > 1 else "") + f" --num_processes {plan.ranks} scripts/sft.py {keys}"
    slurm = f"sbatch --nodes={plan.nodes} --gpus-per-node={plan.ranks // plan.nodes} slurm/sft.sbatch"
    return launch, f"{slurm} --strategy {way.strategy} {keys}"


def as_json(way: Way) -> dict[str, Any]:
    parts = {f"{name}_bytes": round(value) for name, value in vars(way.memory).items()}
    return {
        "strategy": way.strategy,
        "micro_batch_size": way.micro,
        "gradient_accumulation_steps": way.accumulation,
        "gradient_checkpointing": way.checkpointing,
        "fits": way.fits,
        "peak_memory_bytes": round(way.memory.total),
        "memory": parts,
        "tokens_per_second": round(way.tokens_per_second),
    }
