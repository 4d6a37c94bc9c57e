"""From one traced micro-batch to what each rank holds under a strategy, part by part.

What a strategy shards, gathers and buffers is read from its own code or, where that did not tell (ZeRO-2 keeps the
trained weights twice), from what `make plan-check` measures of real steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from stepladder.model import load
from stepladder.planning.trace import PHASES, Traced
from stepladder.recipe.recipe import sums_sharded
from stepladder.settings import Settings

# ZeRO-3 keeps a weight gathered if it is used again within so many weights
# (`stage3_max_reuse_distance`, and `stage3_max_live_parameters`, the defaults of DeepSpeed).
ZERO3_LIVE = 1e9
ZERO_BUCKETS = 2  # of `reduce_bucket_size`: one fills while the other is reduced (`overlap_comm`)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its worst moment, and of host memory for all ranks of a node.

    `loading` is what the loading of the model needs on the device beyond a step. `host` is what lies there in place of
    the device (offload) or while the model loads; what is mapped from its files is not counted.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    communication: float
    overhead: float
    host: float = 0.0
    loading: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(value for name, value in vars(self).items() if name != "host")


def casts(strategy: str) -> bool:
    """Whether the strategy holds in bf16 what is computed with; else autocast makes copies."""
    return strategy.startswith(("zero", "fsdp", "hybrid"))


@dataclass(frozen=True)
class Loading:
    """Bytes while a model loads: on each device, and of host memory for all ranks of a node."""

    device: float
    host: float


def loading(
    traced: Traced, settings: Settings, config: Any, strategy: str, ranks: int, local_ranks: int, on_gpu: bool
) -> Loading:
    """What each rank holds before a strategy has sharded anything.

    Weights in the dtype of their file are mapped from it and belong to no process; others are copies. Under ZeRO-3
    rank 0 reads one parameter after the other. A base in 4 bits is quantized on each device, whole, before it is
    sharded (`update_device_map` in Transformers' `quantizer_bnb_4bit.py`), a parameter of the file's at a time.
    """
    whole, layer = traced.whole, traced.layer
    if settings.get("load_in_4bit"):
        held = whole.held + 2 * layer.parameters
        on_cpu = on_gpu and (settings.get("model_init_kwargs") or {}).get("device_map") == "cpu"
        return Loading(0.0, held * local_ranks) if on_cpu else Loading(held, 0.0)
    if strategy.startswith("zero3") and ranks > 1:
        return Loading(0.0, 0.0)
    dtype = load.weights_dtype(settings, traced.work.precision)
    saved = getattr(config, "dtype", None) or torch.bfloat16  # what most models of today are saved in
    copied = dtype not in ("auto", saved)
    size = torch.float32.itemsize if dtype == "auto" else getattr(dtype, "itemsize", 4)
    full, sharded = not settings.get("use_peft"), strategy.startswith("fsdp") and ranks > 1
    if sharded and full and traced.work.precision != "fp32" and dtype != torch.float32:
        copied, size = True, torch.float32.itemsize  # Accelerate makes fp32 ones of what is trained
    copy = size * (whole.parameters - (0 if full else whole.trainable)) if copied else 0.0
    readers = 1 if sharded and load.can_be_sent(settings) else local_ranks
    if not on_gpu:  # the host's memory is the device's; only one that is sharded is smaller later
        return Loading(copy if sharded else 0.0, 0.0)
    shards = whole.held / ranks * local_ranks if strategy == "fsdp_offload" else 0.0  # beside what they are cut from
    return Loading(0.0, copy * readers + shards)


def estimate(
    traced: Traced, settings: Settings, config: Any, strategy: str, ranks: int, accumulates: bool, overhead: float = 0
) -> Memory:
    """The worst moment of a training step in its steady state.

    Args:
        accumulates: whether an optimizer step takes several micro-batches, so that gradients are there from the start.
        overhead: bytes that the device needs whatever runs on it.
    """
    moments = [_moment(traced, settings, config, strategy, ranks, accumulates, overhead, n) for n in range(5)]
    return max(moments, key=lambda memory: memory.total)


def _moment(
    traced: Traced,
    settings: Settings,
    config: Any,
    strategy: str,
    ranks: int,
    accumulates: bool,
    overhead: float,
    n: int,
) -> Memory:
    """Phase `n` of the trace; after the last one, the optimizer's step."""
    whole, layer = traced.whole, traced.layer
    in_step, backward = n == len(PHASES), n >= 2
    activations, gradients = (0.0, whole.trained) if in_step else (whole.activations[n], whole.gradients[n])
    kept = activations - (0 if in_step else whole.activations[0])
    loss = kept if not in_step and PHASES[n] == "loss" else 0.0
    weights, optimizer = whole.held, whole.states
    every, master = whole.trained, 4 * whole.trainable  # all gradients; ZeRO's own copy of the weights, in fp32
    in_fp32 = optimizer * master / every if every else 0.0  # states of that copy
    held = every if accumulates or in_step else gradients
    communication = host = 0.0
    element = 2 if casts(strategy) and traced.work.precision != "fp32" else 4  # bytes of what ZeRO reduces
    buckets = (
        ZERO_BUCKETS * config.hidden_size**2 * element if backward else 0
    )  # Transformers' `auto` for `reduce_bucket_size`
    outside = whole.computed - config.num_hidden_layers * layer.computed

    if strategy == "ddp" and ranks > 1:
        communication = every  # the buckets stay, beside the gradients (`gradient_as_bucket_view=False`)
    elif strategy == "zero2":
        # DeepSpeed 0.19.8 makes one flat buffer of the trained weights and keeps those that it was made of.
        weights = whole.computed + element * whole.trainable
        optimizer = (in_fp32 + master) / ranks
        parts = [element * part for part in zero2_parts(traced.matrices, whole.trainable, ranks)]
        most, last = max(parts), parts[-1]  # the last layer, whose gradients come first, is the last rank's
        before = most if accumulates else 0.0  # the sum so far, which stays beside this micro-batch's
        at_last = 2 * last if accumulates else last
        held = {2: max(before, at_last), 3: before + most, len(PHASES): most + master / ranks}.get(n, before)
        communication = buckets
    elif strategy.startswith("zero3"):
        gathered = whole.computed * min(1, ZERO3_LIVE / whole.parameters)
        if n == 3:  # the backward pass is the last use of a layer's weights in a step
            gathered = min(gathered, outside + layer.computed)
        communication = buckets + (0 if in_step else gathered)
        weights, optimizer = whole.computed / ranks, (in_fp32 + master) / ranks
        held = element * whole.trainable / ranks + (master / ranks if in_step else 0)
        if strategy.endswith("offload"):
            host, weights, optimizer, held = weights + optimizer + held, 0.0, 0.0, 0.0
    elif strategy.startswith("fsdp"):
        # What belongs to no layer is whole from the forward pass to its end. So is the layer that computes; with it
        # the one fetched before, each beside the buffer that it came in, but for the loss and the embedding's gradient.
        outside_trained = every - config.num_hidden_layers * layer.trained
        at_an_end = n == 1 or (n == 3 and outside_trained > 0)
        communication = 0 if in_step else outside + (1 if at_an_end else 3) * layer.computed
        if backward and not in_step and not at_an_end and gradients >= layer.gradients[3]:
            communication += 2 * layer.gradients[3]  # a layer's whole gradients, once it has them, and their way
        if n == 3 and at_an_end and not accumulates:
            every -= outside_trained  # they are whole still, among the activations
        weights, optimizer = whole.held / ranks, optimizer / ranks
        # a layer's gradients are sharded as it is done: all of them once the first layer is
        held = (every if accumulates or n > 2 else gradients) / ranks
        if accumulates and not in_step and not sums_sharded(settings):
            held = master  # whole, in fp32
        if strategy.endswith("offload"):
            host, weights, optimizer, held = weights + optimizer + held, 0.0, 0.0, 0.0
    return Memory(weights, held, optimizer, activations - loss, loss, communication, overhead, host)


def zero2_parts(matrices: tuple[int, ...], trainable: float, ranks: int) -> list[float]:
    """Numbers in each rank's gradients: the matrices in which its part begins and ends are whole there.

    DeepSpeed 0.19.8, `get_partition_info` and `copy_grads_in_partition` (`stage_1_and_2.py`). Vectors, which the
    optimizer has in a group of their own, are counted by the part.

    Args:
        matrices: the size of each one that is trained, in the model's order.
        trainable: all trained numbers, those of vectors too.
    """
    part, at, held = max(1, math.ceil(sum(matrices) / ranks)), 0, [(trainable - sum(matrices)) / ranks] * ranks
    for size in matrices:
        for rank in range(at // part, math.ceil((at + size) / part)):
            held[rank] += size
        at += size
    return held
