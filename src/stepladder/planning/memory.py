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
from stepladder.planning import sharding
from stepladder.planning.live_bytes import PHASES
from stepladder.planning.sharding import Unit
from stepladder.planning.trace import Traced
from stepladder.recipe.recipe import sums_sharded
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Strategy

ZERO_BUCKETS = 2  # of `reduce_bucket_size`: one fills while the other is reduced (`overlap_comm`)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank, and bytes of host memory for all ranks of a node.

    `loading` is what the loading of the model needs on the device beyond a step. `host` is what lies there in place of
    the device (offload), with the copy that a checkpoint is written from, or while the model loads; what is mapped from
    its files is not counted.
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

    Weights in the dtype of their file are mapped from it and belong to no process; others are copies. Under FSDP rank 0
    alone has them, and lets go of each as it is sent; under ZeRO-3 it reads one parameter after the other. A base in 4
    bits is quantized on each device, whole, before it is sharded (`update_device_map` in Transformers'
    `quantizer_bnb_4bit.py`), a parameter of the file's at a time.
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
        ranks: those that share a model's shards; under HSDP, the ranks of a node.
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
        self.whole, self.layer, self.matrices, self.traced = traced.whole, traced.layer, traced.matrices, traced
        self.settings, self.strategy, self.ranks, self.accumulates = settings, strategy, ranks, accumulates
        self.layers = config.num_hidden_layers
        self.outside = self.whole.computed - self.layers * self.layer.computed  # weights that belong to no layer
        self.element = sharding.zero_element(traced)  # bytes per number of what ZeRO computes with
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
            weights, held, optimizer, communication, activations = self._fsdp(phase)
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
        gathered = 0 if in_step else whole.computed * min(1, sharding.ZERO3_LIVE / whole.parameters)
        if phase == 3:  # the backward pass is the last use of a layer's weights in a step
            gathered = min(gathered, self.outside + self.layer.computed)
        held = (2 if in_step else 1) * self.master / ranks
        communication = gathered + (self.buckets if phase >= 2 else 0)
        return whole.computed / ranks, held, self.master_and_states / ranks, communication

    def _fsdp(self, phase: int) -> tuple[float, float, float, float, float]:
        """The same under FSDP, and the activations, which are not the worst where whole gradients are not there.

        Accelerate makes units of each layer, the embedding, and the last norm with the head (`fsdp2_prepare_model`).
        The latter stay whole from their first use to their last, an embedding tied to the head with them. A unit is
        copied out of the buffer that it came in, which is freed once the next one has come out of its own.
        """
        units = sharding.fsdp_units(self.traced, self.ranks)
        layer, embedding, ends = units["layer"].divide(self.layers), units["embedding"], units["ends"]
        every = sum(unit.reduced for unit in units.values())
        # What the first layer finds sharded; with a tied head, what the embedding does.
        done = every - embedding.reduced - layer.reduced if embedding.gathered else units["layer"].reduced
        activations = self.whole.apart[phase] if phase < len(PHASES) else 0.0
        communication = max(self._gathered(phase, layer, embedding, ends)) - activations if phase < len(PHASES) else 0.0
        now = done if phase == 3 else ends.reduced if phase == 2 else 0.0  # of this micro-batch
        held = (every if self.accumulates or phase > 3 else now) / self.ranks
        if self.strategy.is_hsdp and self.accumulates:  # kept beside their sum until the pass ends (`AllReduceState`)
            held += now / self.ranks
        if self.accumulates and phase < len(PHASES) and not sums_sharded(self.settings):
            held = self.master  # whole, in fp32
        padded = every / self.master if self.master else 1.0
        weights = sharding.fsdp_held(self.traced, self.ranks)
        return weights, held, self.whole.states * padded / self.ranks, communication, activations

    def _gathered(self, phase: int, layer: Unit, embedding: Unit, ends: Unit) -> list[float]:
        """Bytes of activations and of what FSDP gathered and reduces, at each moment that may be a phase's worst.

        The backward pass fetches a unit ahead, and keeps the gradients of the one before on their way.
        """
        whole, apart, fetched = self.whole, self.whole.apart[phase], layer.gathered
        tied, adapter = not embedding.gathered, bool(self.settings.get("use_peft"))
        first, head = embedding.gathered, 2 * ends.gathered
        always = ends.gathered if tied else 0.0
        if phase == 0:
            start = 2 * always if tied else 2 * first - 2 * fetched
            last = 0.0 if tied or adapter else head + fetched  # with an adapter, only the loss gathers the head
            return [apart + always + 2 * fetched, whole.kept + always + 3 * fetched, start + 2 * fetched,
                    whole.kept + last]  # fmt: skip
        if phase == 1:
            gathered = head if adapter and not tied else 0.0  # `full_tensor`, with its copy
            return [apart + ends.gathered + fetched, whole.kept + gathered + fetched]
        if phase == 2:
            return [apart + always + 2 * fetched + max(layer.reduced, 0.0 if tied else ends.reduced)]
        if tied:
            return [apart + always + layer.reduced + (0.0 if ends.reduced else fetched)]
        on_embedding = embedding.reduced + (embedding.reduced + layer.reduced) / self.ranks
        return [apart + max(on_embedding, layer.reduced + fetched + first), 2 * first + layer.reduced]


def checkpoint_copy(traced: Traced, settings: Settings, strategy: Strategy) -> float:
    """Bytes of the copy in host memory that a checkpoint is written from, of all ranks together."""
    whole = traced.whole
    if settings.get("save_strategy") == "no" or not whole.trained:
        return 0.0
    weights = 4 * whole.trainable if strategy.is_zero else whole.trained  # ZeRO's are its fp32 ones
    return weights * (1 if settings.get("save_only_model") else 1 + whole.states / whole.trained)


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
