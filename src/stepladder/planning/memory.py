"""The memory of each rank under a strategy, part by part, from one traced micro-batch.

What a strategy shards, gathers and buffers is read from its own code or, where that did not tell (ZeRO-2 keeps the
trained weights twice), from what `make plan-check` measures of real steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from stepladder.model import pretrained
from stepladder.planning.trace import PHASES, Traced
from stepladder.recipe.recipe import sums_sharded
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Strategy

# ZeRO-3 keeps a weight gathered if it is used again within so many weights
# (`stage3_max_reuse_distance`, and `stage3_max_live_parameters`, the defaults of DeepSpeed).
ZERO3_LIVE = 1e9
ZERO_BUCKETS = 2  # of `reduce_bucket_size`: one fills while the other is reduced (`overlap_comm`)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank, and bytes of host memory for all ranks of a node.

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


@dataclass(frozen=True)
class Loading:
    """Bytes while a model loads: on each device, and of host memory for all ranks of a node."""

    device: float
    host: float


def loading(
    traced: Traced, settings: Settings, config: Any, strategy: Strategy, ranks: int, local_ranks: int, on_gpu: bool
) -> Loading:
    """What each rank holds while the model loads, before a strategy has sharded anything.

    Weights in the dtype of their file are mapped from it and belong to no process; others are copies. Under ZeRO-3
    rank 0 reads one parameter after the other. A base in 4 bits is quantized on each device, whole, before it is
    sharded (`update_device_map` in Transformers' `quantizer_bnb_4bit.py`), a parameter of the file's at a time.
    """
    whole, layer = traced.whole, traced.layer
    if settings.get("load_in_4bit"):
        held = whole.held + 2 * layer.parameters
        on_cpu = on_gpu and (settings.get("model_init_kwargs") or {}).get("device_map") == "cpu"
        return Loading(0.0, held * local_ranks) if on_cpu else Loading(held, 0.0)
    if strategy.is_zero3 and ranks > 1:
        return Loading(0.0, 0.0)
    dtype = pretrained.weights_dtype(settings, traced.work.precision)
    saved = getattr(config, "dtype", None) or torch.bfloat16  # what most models of today are saved in
    copied = dtype not in ("auto", saved)
    size = torch.float32.itemsize if dtype == "auto" else getattr(dtype, "itemsize", 4)
    full, sharded = not settings.get("use_peft"), strategy.is_fsdp and ranks > 1
    if sharded and full and traced.work.precision != "fp32" and dtype != torch.float32:
        copied, size = True, torch.float32.itemsize  # Accelerate makes fp32 ones of what is trained
    copy = size * (whole.parameters - (0 if full else whole.trainable)) if copied else 0.0
    readers = 1 if sharded and pretrained.recipe_can_be_sent(settings) else local_ranks
    if not on_gpu:  # the host's memory is the device's; only one that is sharded is smaller later
        return Loading(copy if sharded else 0.0, 0.0)
    # Offloaded shards lie beside the weights that they are cut from.
    shards = whole.held / ranks * local_ranks if strategy.is_fsdp and strategy.offloads else 0.0
    return Loading(0.0, copy * readers + shards)


def estimate(
    traced: Traced, settings: Settings, config: Any, strategy: Strategy, ranks: int, accumulates: bool,
    overhead: float = 0,
) -> Memory:  # fmt: skip
    """The peak of a training step in its steady state.

    Args:
        accumulates: whether an optimizer step takes several micro-batches, so that gradients are there from the start.
        overhead: bytes that the device needs whatever runs on it.
    """
    step = _Step(traced, settings, config, strategy, ranks, accumulates)
    moments = [step.memory(phase, overhead) for phase in range(len(PHASES) + 1)]
    return max(moments, key=lambda memory: memory.total)


class _Step:
    """A training step under a strategy. A phase is an index of `PHASES`; after the last one comes the optimizer."""

    def __init__(
        self, traced: Traced, settings: Settings, config: Any, strategy: Strategy, ranks: int, accumulates: bool
    ) -> None:
        self.whole, self.layer, self.matrices = traced.whole, traced.layer, traced.matrices
        self.settings, self.strategy, self.ranks, self.accumulates = settings, strategy, ranks, accumulates
        self.layers = config.num_hidden_layers
        self.outside = self.whole.computed - self.layers * self.layer.computed  # weights that belong to no layer
        # Bytes per number of what ZeRO computes with; it sums gradients in fp32 (`trainer.sum_in_fp32`).
        self.element = 2 if strategy.shards and traced.work.precision != "fp32" else 4
        # Bytes per number of its buckets, whose size is Transformers' `auto` for `reduce_bucket_size`.
        bucket = ZERO_BUCKETS * 4
        if strategy == "zero2" and self.element == 2:  # filled in 16 bits, and sent as an fp32 copy
            bucket = ZERO_BUCKETS * 2 + 4
        self.buckets = bucket * config.hidden_size**2
        self.master = 4 * self.whole.trainable  # ZeRO's own copy of the trained weights, in fp32
        states = self.whole.states * self.master / self.whole.trained if self.whole.trained else 0.0
        self.master_and_states = self.master + states

    def memory(self, phase: int, overhead: float) -> Memory:
        """What a rank holds at the peak of a phase."""
        whole, in_step = self.whole, phase == len(PHASES)
        activations, gradients = (0.0, whole.trained) if in_step else (whole.activations[phase], whole.gradients[phase])
        loss = activations - whole.activations[0] if not in_step and PHASES[phase] == "loss" else 0.0
        if self.strategy == "zero2":
            weights, held, optimizer, communication = self._zero2(phase)
        elif self.strategy.is_zero3:
            weights, held, optimizer, communication = self._zero3(phase)
        elif self.strategy.is_fsdp:
            weights, held, optimizer, communication = self._fsdp(phase, gradients)
        else:
            weights, optimizer = whole.held, whole.states
            held = whole.trained if self.accumulates or in_step else gradients
            # DDP's buckets stay, beside the gradients (`gradient_as_bucket_view=False`).
            communication = whole.trained if self.strategy == "ddp" and self.ranks > 1 else 0.0
        host = 0.0
        if self.strategy.offloads:
            host, weights, optimizer, held = weights + optimizer + held, 0.0, 0.0, 0.0
        return Memory(weights, held, optimizer, activations - loss, loss, communication, overhead, host)

    def _zero2(self, phase: int) -> tuple[float, float, float, float]:
        """Bytes of weights, gradients, optimizer and communication under ZeRO-2."""
        # DeepSpeed 0.19.8 makes one flat buffer of the trained weights and keeps those that it was made of.
        weights = self.whole.computed + self.element * self.whole.trainable
        if self.element == 2:  # one buffer of this rank's part, which sums the micro-batches and is the optimizer's
            held = self.master / self.ranks if self.accumulates or phase >= 2 else 0.0
        else:
            parts = [4 * part for part in zero2_parts(self.matrices, self.whole.trainable, self.ranks)]
            most, last = max(parts), parts[-1]  # the last layer, whose gradients come first, is the last rank's
            before = most if self.accumulates else 0.0  # the sum so far, which stays beside this micro-batch's
            at_last = 2 * last if self.accumulates else last
            at_step = most + self.master / self.ranks
            held = {2: max(before, at_last), 3: before + most, len(PHASES): at_step}.get(phase, before)
        return weights, held, self.master_and_states / self.ranks, self.buckets if phase >= 2 else 0

    def _zero3(self, phase: int) -> tuple[float, float, float, float]:
        """The same under ZeRO-3."""
        whole, ranks, in_step = self.whole, self.ranks, phase == len(PHASES)
        gathered = 0 if in_step else whole.computed * min(1, ZERO3_LIVE / whole.parameters)
        if phase == 3:  # the backward pass is the last use of a layer's weights in a step
            gathered = min(gathered, self.outside + self.layer.computed)
        held = (2 if in_step else 1) * self.master / ranks
        communication = gathered + (self.buckets if phase >= 2 else 0)
        return whole.computed / ranks, held, self.master_and_states / ranks, communication

    def _fsdp(self, phase: int, gradients: float) -> tuple[float, float, float, float]:
        """The same under FSDP.

        What belongs to no layer is whole from the forward pass to its end. So is the layer that computes; with it the
        one fetched before, each beside the buffer that it came in, but for the loss and the embedding's gradient.
        """
        layer, every, in_step = self.layer, self.whole.trained, phase == len(PHASES)
        outside_trained = every - self.layers * layer.trained
        at_an_end = phase == 1 or (phase == 3 and outside_trained > 0)
        communication = 0 if in_step else self.outside + (1 if at_an_end else 3) * layer.computed
        if phase in (2, 3) and not at_an_end and gradients >= layer.gradients[3]:
            communication += 2 * layer.gradients[3]  # a layer's whole gradients, once it has them, and their way
        if phase == 3 and at_an_end and not self.accumulates:
            every -= outside_trained  # they are whole still, among the activations
        # a layer's gradients are sharded as it is done: all of them once the first layer is
        held = (every if self.accumulates or phase > 2 else gradients) / self.ranks
        if self.accumulates and not in_step and not sums_sharded(self.settings):
            held = self.master  # whole, in fp32
        return self.whole.held / self.ranks, held, self.whole.states / self.ranks, communication


def zero2_parts(matrices: tuple[int, ...], trainable: float, ranks: int) -> list[float]:
    """Numbers in each rank's gradients; matrices in which its part begins and ends are held in full.

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
