"""The strategies and micro-batches that run a recipe on some GPUs: memory, speed, and the best of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepladder import hardware, installation
from stepladder.console import quote_for_shell
from stepladder.errors import LaunchError
from stepladder.hardware import CORES_PER_GPU, GIB, GPU, GPUS, MEMORY_PER_GPU, peak_resident_bytes
from stepladder.model import fp8
from stepladder.planning import memory, meta_model, speed, trace
from stepladder.planning.memory import Memory
from stepladder.recipe.recipe import split_batch
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Launch, Strategy

PROCESS = 4 * GIB  # host memory of a process that uses CUDA: libraries, pinned buffers, NCCL's
# The simplest first: it is taken where two are equally fast.
STRATEGIES = tuple(map(Strategy, ("single", "ddp", "zero2", "fsdp", "hsdp", "zero3", "fsdp_offload", "zero3_offload")))


@dataclass(frozen=True)
class Candidate:
    """A strategy with a micro-batch and checkpointing on or off; `limit` and `host_limit` are bytes."""

    strategy: Strategy
    micro: int
    accumulation: int
    checkpointing: bool
    memory: Memory
    limit: float
    host_limit: float | None  # of a node; None where nobody knows it
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit and self.host_fits

    @property
    def host_fits(self) -> bool:
        return self.host_limit is None or self.memory.host <= self.host_limit

    @property
    def batch(self) -> str:
        """The micro-batch and checkpointing, for a person."""
        return f"micro-batch {self.micro}, checkpointing {'on' if self.checkpointing else 'off'}"

    @property
    def keys(self) -> list[str]:
        """The micro-batch and checkpointing as words of a command line."""
        checkpointing = str(self.checkpointing).lower()
        return ["--per_device_train_batch_size", str(self.micro), "--gradient_checkpointing", checkpointing]

    @property
    def gib(self) -> str:
        """What it needs of a device, and what the device has."""
        return f"{self.memory.total / GIB:.1f} of {self.limit / GIB:.1f} GiB"


class Plan:
    """A recipe on `nodes` nodes with `gpus` GPUs each.

    Args:
        length: tokens per row, instead of the recipe's `max_length`.
        precision: instead of the one that the recipe and the device give.
        overhead: bytes per rank that the device needs beside tensors.
        on_gpu: whether the loss runs in a GPU's kernels.
        host: bytes of a node's memory, where known.
        replicas: of the model under HSDP; one per node by default.
    """

    def __init__(
        self, settings: Settings, nodes: int, gpus: int, device: GPU, length: int | None = None,
        precision: str | None = None, overhead: float | None = None, on_gpu: bool = True, host: float | None = None,
        replicas: int | None = None,
    ):  # fmt: skip
        if nodes < 1 or gpus < 1:
            raise LaunchError(
                f"{nodes} nodes with {gpus} GPUs train nothing", where="command line", help="--nodes 1 --gpus 1"
            )
        if gpus > 1 and hardware.SLICE.search(device.name):
            raise LaunchError(f"{gpus} ranks on {device.name}", why=hardware.ONE_SLICE, help="--gpus 1, or a whole GPU")
        fp8.check_planned(settings, device)
        self.settings, self.nodes, self.ranks, self.device, self.on_gpu = settings, nodes, nodes * gpus, device, on_gpu
        self.host, self.replicas = host, replicas or nodes
        self.config = meta_model.load_config(settings)
        in_fp32 = settings.get("bf16") is False and not settings.get("fp16")
        self.precision = precision or ("fp32" if in_fp32 else "bf16" if device.bf16 else "fp16")
        context = hardware.CONTEXT + (hardware.NCCL if self.ranks > 1 else 0)
        self.overhead = context if overhead is None else overhead
        length = length or settings.get("max_length") or 1024
        self.length = min(length, getattr(self.config, "max_position_embeddings", None) or length)
        self.rows = settings.get("global_batch_size") or (
            settings.get("per_device_train_batch_size") * settings.get("gradient_accumulation_steps") * self.ranks
        )
        split_batch(self.rows, 1, self.ranks, settings.where("global_batch_size"))  # raises where rows < ranks

    def candidates(self, strategies: tuple[Strategy, ...] = STRATEGIES) -> list[Candidate]:
        """For each strategy, without and with checkpointing: the fastest micro-batch that fits, or 1."""
        found = []
        for strategy in strategies:
            if strategy.is_hsdp and (self.nodes == 1 or self.ranks == self.nodes):
                continue  # fsdp on one node, and ddp with one rank a node
            alone = strategy == "single" or strategy.offloads  # one rank has nothing to shard over
            if alone if self.ranks == 1 else strategy != "single":
                for checkpointing in (False, True):
                    tried = [self.candidate(strategy, micro, checkpointing) for micro in self.micros()]
                    found.append(fastest(tried) or tried[0])
        return found

    def all_candidates(self, strategy: Strategy) -> list[Candidate]:
        """Every micro-batch of one strategy, without and with checkpointing."""
        micros = self.micros()
        return [self.candidate(strategy, micro, checkpointing) for checkpointing in (False, True) for micro in micros]

    def micros(self) -> list[int]:
        most = self.rows // self.ranks
        return [micro for micro in (1, 2, 4, 8, 16, 32, 64) if micro <= most]

    def one_micro_batch(self) -> tuple[int, bool]:
        """The micro-batch and checkpointing of the best candidate that fits; else those that need the least memory."""
        best = self.best(self.candidates())
        return (best.micro, best.checkpointing) if best else (1, True)

    def of_recipe(self, strategy: Strategy) -> Candidate:
        """The recipe's own micro-batch and checkpointing; for those that are `auto`, the fastest that fits.

        Raises:
            LaunchError: one is `auto`, and nothing fits.
        """
        micro = self.settings.get("per_device_train_batch_size")
        kept = self.settings.get("gradient_checkpointing")
        newer = self.settings.get("activation_checkpointing")  # the same under its new name, which wins
        if "auto" not in (micro, kept):
            return self.candidate(strategy, micro, bool(kept if newer is None else newer))
        micros = self.micros() if micro == "auto" else [micro]
        checkpoints = (False, True) if kept == "auto" else (bool(kept if newer is None else newer),)
        tried = [self.candidate(strategy, micro, checkpointing) for checkpointing in checkpoints for micro in micros]
        found = fastest(tried)
        if found is None:
            raise no_fit_error(self, tried)
        return found

    def candidate(self, strategy: Strategy, micro: int, checkpointing: bool) -> Candidate:
        step = split_batch(self.rows, micro, self.ranks)
        traced = self._traced(step.micro, checkpointing, strategy.shards)
        sharers = self.ranks // self.replicas if strategy.is_hsdp else self.ranks
        need = memory.estimate(
            traced, self.settings, self.config, strategy, sharers, step.accumulation > 1, self.overhead
        )
        # What a rank holds in a step, with what loading takes beyond it, and the host memory of a node.
        local = self.ranks // self.nodes
        loads = memory.loading(traced, self.settings, self.config, strategy, sharers, local, self.on_gpu)
        host = max(need.host * local, loads.host) if self.on_gpu else 0.0
        saving = need.host * local + memory.checkpoint_copy(traced, self.settings, strategy) / self.nodes
        if self.on_gpu and (self.host is None or saving <= self.host):  # else the saves block the training
            host = max(host, saving)
        need = replace(need, host=host, loading=max(0.0, loads.device + need.overhead - need.total))
        took = self.step(strategy, step.micro, checkpointing, step.accumulation, self.ranks, self.nodes)
        fast = speed.tokens_per_second(traced, self.ranks, step.accumulation, took) * self.rows / step.places
        limit = self.device.memory * GIB / (1 + hardware.ALLOCATOR)
        return Candidate(strategy, step.micro, step.accumulation, checkpointing, need, limit, self.host, fast)

    def step(
        self, strategy: Strategy, micro: int, checkpointing: bool, accumulation: int, ranks: int, nodes: int,
        network: speed.Network = speed.INFINIBAND,
    ) -> speed.Step:  # fmt: skip
        """The seconds of an optimizer step on `ranks` ranks of `nodes` nodes."""
        traced = self._traced(micro, checkpointing, strategy.shards)
        return speed.step(
            traced, self.settings, self.config, strategy, ranks, nodes, accumulation, self.device, network
        )

    def sizes(self, candidate: Candidate) -> tuple[float, float, float]:
        """Bytes of the trained weights, of the optimizer's state, and of the saved result."""
        whole = self._traced(candidate.micro, candidate.checkpointing, candidate.strategy.shards).whole
        adapter = bool(self.settings.get("use_peft"))
        return whole.trained, whole.states, whole.trained if adapter else whole.held

    def best(self, candidates: list[Candidate]) -> Candidate | None:
        """The fastest that fits; one that offloads only if no other fits. Ties go to the simplest strategy.

        Where a node's host memory is unknown, those that need more than nodes commonly have come last.
        """

        def order(one: Candidate) -> tuple[bool, bool, int, int]:
            much = one.host_limit is None and one.memory.host > hardware.COMMON_HOST
            return much, one.strategy.offloads, -round(one.tokens_per_second), STRATEGIES.index(one.strategy)

        return min((one for one in candidates if one.fits), key=order, default=None)

    @functools.cache  # noqa: B019 - a plan lives as long as its script
    def _traced(self, micro: int, checkpointing: bool, cast: bool) -> trace.Traced:
        # Padded batches grow by the same amount with every row; the mask of rows end to end by their square.
        if micro > 4 and not trace.end_to_end(self.settings):
            two, four = (self._traced(n, checkpointing, cast) for n in (2, 4))
            return four.extrapolate(two, (micro - 4) / 2, micro)
        work = meta_model.Work(micro, self.length, self.precision, checkpointing, cast, self.on_gpu)
        return trace.trace_batch(self.settings, self.config, work)


def host_bytes(plan: Plan, candidate: Candidate) -> float:
    """Bytes of host memory per GPU: its part of what the node needs, and those of a CUDA process."""
    return candidate.memory.host / (plan.ranks // plan.nodes) + PROCESS


def fastest(candidates: list[Candidate]) -> Candidate | None:
    """The fastest that fits; of those within 1 % of its speed, the one that needs the least memory."""
    fit = [one for one in candidates if one.fits]
    most = max((one.tokens_per_second for one in fit), default=0)
    equal = [one for one in fit if one.tokens_per_second >= 0.99 * most]
    return min(equal, key=lambda one: one.memory.total, default=None)


def plan_run(
    settings: Settings, launch: Launch, precision: str, longest: int | None, gpu: bool
) -> tuple[Plan, Candidate]:
    """Plan the run that starts now, in the terms of `totals.peak_memory_bytes`.

    On a GPU these are PyTorch's tensors; on a CPU, and on Apple's GPU, which shares its memory, it is the resident set,
    of which the process's present one is fixed.

    Args:
        longest: tokens of the longest row.

    Raises:
        ModelError: the architecture cannot be planned.
        LaunchError: the micro-batch is `auto`, and nothing fits; or quantizing the base takes more than the GPU has.
    """
    device, strategy, local_ranks = hardware.device_here(launch.local_ranks, gpu), launch.strategy, launch.local_ranks
    if not gpu and strategy.is_fsdp:  # the shards lie in host memory anyhow (training/launch/ranks.py)
        strategy = Strategy(strategy.removesuffix("_offload"))
    shared = not gpu or hardware.accelerator() == "mps"  # the process and its tensors lie in one memory
    overhead = peak_resident_bytes() if shared else 0
    host = None if shared else hardware.host_memory()
    nodes, replicas = launch.ranks // local_ranks, launch.replicas
    plan = Plan(settings, nodes, local_ranks, device, longest, precision, overhead, gpu, host, replicas)
    candidate = plan.of_recipe(strategy)
    if gpu and candidate.memory.loading and candidate.memory.total > device.memory * GIB:
        raise no_fit_error(plan, [candidate])
    return plan, candidate


def plan_for_manifest(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    """The plan as facts for run.json, with the values chosen for `auto` and the reason."""
    facts = {"tokens_a_row": plan.length, **as_json(candidate)}
    if not plan.on_gpu or hardware.gpu_here() is None:
        del facts["tokens_per_second"]  # no stated peak to compute with
    values = {"per_device_train_batch_size": candidate.micro, "gradient_checkpointing": candidate.checkpointing}
    chosen = {key: value for key, value in values.items() if plan.settings.get(key) == "auto"}
    if chosen:
        words = ", ".join(f"{key}: {str(value).lower()}" for key, value in chosen.items())
        facts |= {
            "chosen": chosen,
            "reason": f"auto: {words}, the fastest that fits: {candidate.memory.total / GIB:.2f} of "
            f"{candidate.limit / GIB:.2f} GiB a rank",
        }
    return facts


def steps(settings: Settings, rows: int | None, global_batch: int) -> int | None:
    """Optimizer steps of the whole run; None if neither `max_steps` nor the number of rows is known."""
    if settings.get("max_steps") > 0:
        return int(settings.get("max_steps"))
    if rows is None:
        return None
    return math.ceil(settings.get("num_train_epochs") * math.ceil(rows / global_batch))


def no_fit_error(plan: Plan, candidates: list[Candidate]) -> LaunchError:
    """The error that nothing fits, with the smallest hardware that would do and the keys to change."""
    if loaded := [one for one in candidates if one.memory.total <= one.limit]:
        return _no_host(plan, min(loaded, key=lambda one: one.memory.host))
    least = min(candidates, key=lambda one: one.memory.total)
    need = least.memory.total * (1 + hardware.ALLOCATOR) / GIB
    enough = sorted((d for d in GPUS if d.memory >= need), key=lambda d: d.memory)
    gpus = f"{plan.ranks} × {enough[0].name} ({enough[0].memory:.0f} GiB)" if enough else "more GPUs, to shard over"
    remedies = [f"{gpus}: the least that would do, under {least.strategy}"]
    if not plan.settings.get("use_peft"):
        remedies.append("--use_peft true: an adapter has a hundredth of the gradients and optimizer states")
    elif not plan.settings.get("load_in_4bit"):
        remedies.append("--load_in_4bit true: the frozen weights take a quarter of their bf16 size")
    if plan.length > 512 and not least.memory.loading:
        remedies.append(f"--max_length {plan.length // 2}: half of the activations")
    return LaunchError(
        f"no way fits into {plan.ranks} × {plan.device.name}: the least needs {need:.1f} GiB a GPU, "
        f"and one has {plan.device.memory:.1f}",
        why=f"{least.strategy}, {least.batch}"
        + "; each GPU quantizes the whole base before a strategy shards it" * bool(least.memory.loading),
        help="\n".join(remedies),
    )


def _no_host(plan: Plan, least: Candidate) -> LaunchError:
    """The error that the model fits into the GPUs, but not into the host memory of a node."""
    remedies = ["accelerate_configs/zero3.yaml: rank 0 reads one parameter after the other"]
    if plan.settings.get("use_peft"):
        remedies.append("--dtype bfloat16: frozen weights in the dtype of their file are mapped from it, not copied")
    return LaunchError(
        f"no way fits into the host memory of a node: the least needs {least.memory.host / GIB:.1f} GiB, "
        f"and it has {(least.host_limit or 0) / GIB:.1f}",
        why=f"{least.strategy}, while the model loads or for what it offloads, {plan.ranks // plan.nodes} ranks a node",
        help="\n".join(remedies),
    )


def command(recipe: str, overrides: list[str], plan: Plan, candidate: Candidate) -> tuple[str, str]:
    """The command line on the machine, and the one for Slurm, which needs the templates in slurm/.

    Args:
        overrides: the recipe's keys on the command line, of which the candidate's replace some.
    """
    kept, keeps = [], True
    for word in overrides:
        if word.startswith("--"):
            key = word[2:].partition("=")[0].replace("-", "_")
            keeps = f"--{key}" not in (*candidate.keys, "--activation_checkpointing")
        kept += [word] if keeps else []
    keys = quote_for_shell("--recipe", recipe, *kept, *candidate.keys)
    several = f" --num_machines {plan.nodes} --machine_rank 0 --main_process_ip HOST --main_process_port 29500"
    launch = installation.launch_command(candidate.strategy, plan.ranks, several if plan.nodes > 1 else "")
    launch += f" {keys}"
    host = max(MEMORY_PER_GPU, math.ceil(host_bytes(plan, candidate) / GIB))
    slurm = f"sbatch --nodes={plan.nodes} --gpus-per-node={plan.ranks // plan.nodes}"
    slurm += f" --cpus-per-gpu={CORES_PER_GPU} --mem-per-gpu={host}G slurm/sft.sbatch"
    elsewhere = "" if Path("slurm/sft.sbatch").is_file() else "   # where slurm/ lies: stepladder init DIR copies it"
    return launch, f"{slurm} --strategy {candidate.strategy} {keys}{elsewhere}"


def as_json(candidate: Candidate) -> dict[str, Any]:
    parts = {f"{name}_bytes": round(value) for name, value in vars(candidate.memory).items() if name != "host"}
    return {
        "strategy": candidate.strategy,
        "micro_batch_size": candidate.micro,
        "gradient_accumulation_steps": candidate.accumulation,
        "gradient_checkpointing": candidate.checkpointing,
        "fits": candidate.fits,
        "peak_memory_bytes": round(candidate.memory.total),
        "memory": parts,
        "host_memory_bytes": round(candidate.memory.host),
        "tokens_per_second": round(candidate.tokens_per_second),
    }
