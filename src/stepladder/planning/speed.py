"""An estimate of the time of a step: FLOPs by the peak that training reaches, bytes by the links.

Precise enough to compare strategies: published runs of 1 to 8 billion parameters reach 33 to
56 % of the peak (docs/planning.md), and small models less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepladder.hardware import GPU
from stepladder.model import flops
from stepladder.planning import sharding
from stepladder.planning.trace import Traced
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Strategy

EFFICIENCY = 0.40  # of the peak: NeMo Automodel's Llama-3-8B LoRA on an H100 reaches 0.41
# The same under ZeRO and FSDP: torchtitan's Llama 3.1 8B on 8 H100, eager, reaches 0.33
# (benchmarks/llama3_h100_202412_torchtitan.md: 5,762 tokens/s a GPU; 6,667 compiled).
SHARDED = 0.33
IN_FOUR_BITS = 0.78  # of LoRA's speed: torchtune's Llama-3.1-8B on a 4090, 2,413 against 3,083 tokens/s
# Tokens of a micro-batch below which weights are read more slowly than they are used: an H100 does 989 TFLOP/s
# and reads 3.35 TB/s, 295 operations a byte, and a bf16 weight takes part in one a token and byte.
SATURATED = 300
OPERATOR = 10e-6  # seconds that PyTorch takes to launch one, a usual figure; measured nowhere here
TO_HOST = 25.0  # GB/s one way: PCIe 4.0 × 16 as it is reached
REACHED = 0.8  # of a link's stated rate: nccl-tests reach 230 to 250 of an A100's 300 GB/s
BUCKET = 25 * 2**20  # bytes of an all-reduce of DDP's (`bucket_cap_mb`)
# Seconds: of a collective, of a hop within a node and between nodes (NCCL 2.9, `src/graph/tuning.cc`, ring and simple
# protocol), and of a hop between nodes of the tree that an all-reduce takes where it is shorter.
START, HOP_INSIDE, HOP_BETWEEN, TREE_HOP = 8.4e-6, 3.4e-6, 9.6e-6, 50e-6


@dataclass(frozen=True)
class Network:
    """The network between nodes: GB/s one way, per GPU or per node."""

    name: str
    of_gpu: float = 0.0
    of_node: float = 0.0

    def rate(self, gpus: int) -> float:
        return self.of_node or self.of_gpu * gpus


INFINIBAND = Network("InfiniBand, 400 Gb/s a GPU", of_gpu=50.0)
ETHERNET = Network("Ethernet, 100 Gb/s a node", of_node=12.5)


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step: compute, and each collective; `exposed` is not hidden behind compute."""

    compute: float
    collectives: dict[str, float]
    offload: float
    exposed: float

    @property
    def communication(self) -> float:
        return sum(self.collectives.values())

    @property
    def total(self) -> float:
        return max(self.compute, self.communication, self.offload) + self.exposed


def count_batch_flops(traced: Traced, config: Any, full: bool) -> float:
    """The operations of a micro-batch, attention by its causal pairs; checkpointing computes the forward pass twice."""
    tokens = max(traced.work.micro * traced.work.length, SATURATED)
    pairs = tokens * (traced.work.length + 1) / 2
    model = flops.count_flops(config, traced.whole.parameters, traced.whole.trainable, full)
    again = model.count_forward(tokens, pairs) if traced.work.checkpointing else 0
    return model.count_training(tokens, pairs) + again


def step(
    traced: Traced, settings: Settings, config: Any, strategy: Strategy, ranks: int, nodes: int, accumulation: int,
    device: GPU, network: Network = INFINIBAND,
) -> Step:  # fmt: skip
    """The time of an optimizer step of `accumulation` micro-batches on each of `ranks`."""
    efficiency = SHARDED if ranks > 1 and strategy.shards else EFFICIENCY
    reached = device.tflops * 1e12 * efficiency * (IN_FOUR_BITS if settings.get("load_in_4bit") else 1)
    arithmetic = count_batch_flops(traced, config, not settings.get("use_peft")) / reached
    again = 4 / 3 if traced.work.checkpointing else 1  # the trace counts them too, but for the second forward pass
    compute = accumulation * max(arithmetic, OPERATOR * traced.whole.operators * again)
    layers, weights = config.num_hidden_layers, traced.whole.computed
    collectives: dict[str, float] = {}
    exposed = offload = 0.0
    if ranks > 1:
        sent = sharding.count_traffic(traced, settings, config, strategy, ranks, nodes, accumulation)
        ring = Ring(ranks, nodes, device, network)
        if strategy.is_hsdp:  # a replica on each node
            between, ring = Ring(nodes, nodes, device, network), Ring(ranks // nodes, 1, device, network)
            collectives["all-reduce"] = between.reduce(sent["all-reduce"]) if nodes > 1 else 0.0
        elif not strategy.shards:
            collectives["all-reduce"] = ring.reduce(sent["all-reduce"])
            exposed = ring.reduce(min(sent["all-reduce"], BUCKET))  # the last bucket has nothing left to hide behind
        if "reduce-scatter" in sent:
            collectives["reduce-scatter"] = ring.gather(sent["reduce-scatter"], accumulation * layers)
        if strategy == "zero2":
            exposed = ring.gather(sent["all-gather"], 1)  # the updated weights, after the step
        elif strategy.shards:
            collectives["all-gather"] = ring.gather(sent["all-gather"], accumulation * 2 * layers)
            exposed = ring.gather(weights / layers, 1)  # the first layer waits for its weights
        if strategy.is_hsdp and nodes > 1:
            exposed += between.reduce(sent["all-reduce"] / layers)  # of the first layer
    if strategy.offloads:
        moved = accumulation * 2 * weights / ranks + 8 * traced.whole.trainable / ranks
        offload = moved / (TO_HOST * 1e9)
    return Step(compute, collectives, offload, exposed)


@dataclass(frozen=True)
class Ring:
    """Collectives over `ranks` on `nodes`, as NCCL's own model has them."""

    ranks: int
    nodes: int
    device: GPU
    network: Network

    @property
    def rate(self) -> float:
        """Bytes per second through the slowest link. A node's rings share the links of all its GPUs."""
        inside = self.device.link if self.ranks > self.nodes else math.inf
        between = self.network.rate(self.ranks // self.nodes) if self.nodes > 1 else math.inf
        return min(inside, between) * 1e9 * REACHED

    def gather(self, size: float, calls: int) -> float:
        """Seconds to gather `size` bytes in `calls` parts, or to reduce and scatter them."""
        hops = (self.ranks - self.nodes) * HOP_INSIDE + (self.nodes - 1) * HOP_BETWEEN
        return size * (self.ranks - 1) / self.ranks / self.rate + calls * (START + hops)

    def reduce(self, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes in buckets."""
        ring = 2 * ((self.ranks - self.nodes) * HOP_INSIDE + (self.nodes - 1) * HOP_BETWEEN)
        tree = 2 * ((self.ranks / self.nodes - 1) * HOP_INSIDE + math.log2(self.nodes) * TREE_HOP)
        latency = START + min(ring, tree)
        return 2 * size * (self.ranks - 1) / self.ranks / self.rate + math.ceil(size / BUCKET) * latency


def tokens_per_second(traced: Traced, ranks: int, accumulation: int, took: Step) -> float:
    """Tokens in a second over all ranks."""
    return ranks * traced.work.micro * traced.work.length * accumulation / took.total
