"""What FSDP and ZeRO-3 pad, hold, gather and reduce of a model's parameters; checked by benchmarks/plan_scale.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepladder.planning.trace import Parameter, Traced
from stepladder.recipe.recipe import sums_sharded
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Strategy

# ZeRO-3 holds at most so many gathered numbers, and keeps those that are used again within as many
# (`stage3_max_live_parameters` and `stage3_max_reuse_distance`, the defaults of DeepSpeed).
ZERO3_LIVE = 1e9
# ZeRO-3 keeps a parameter whole that has at most so many numbers times the hidden size (Transformers' `auto` for
# `stage3_param_persistence_threshold`).
ZERO3_PERSISTENT = 10


@dataclass(frozen=True)
class Unit:
    """Bytes of the parameters that are gathered together, padded: all that is gathered, and the gradients in fp32."""

    gathered: float
    reduced: float

    def divide(self, count: int) -> Unit:
        return Unit(self.gathered / count, self.reduced / count)


def count_padded(parameter: Parameter, ranks: int) -> int:
    """Numbers of a parameter under FSDP, which pads the first dimension to a multiple of the ranks.

    Of LoRA's A with 16 rows, 512 ranks gather 512 (`_get_dim0_padded_size` in torch's `fully_shard`).
    """
    return math.ceil(parameter.rows / ranks) * ranks * (parameter.numbers // parameter.rows)


def fsdp_units(traced: Traced, ranks: int) -> dict[str, Unit]:
    """The units of a model under FSDP: all its layers together, the embedding, and the ends."""
    units = dict.fromkeys(("layer", "embedding", "ends"), (0, 0))
    for parameter in traced.parameters:
        numbers, (gathered, reduced) = count_padded(parameter, ranks), units[parameter.part]
        units[parameter.part] = gathered + numbers * parameter.computed, reduced + 4 * numbers * parameter.trained
    return {part: Unit(*sizes) for part, sizes in units.items()}


def fsdp_held(traced: Traced, ranks: int) -> float:
    """Bytes of weights on a rank under FSDP: its padded shards, and in full what is no parameter (4 bits' scales)."""
    shards = sum(count_padded(p, ranks) / ranks * p.held for p in traced.parameters)
    return traced.whole.held - sum(p.numbers * p.held for p in traced.parameters) + shards


def count_traffic(
    traced: Traced, settings: Settings, config: Any, strategy: Strategy, ranks: int, nodes: int, accumulation: int
) -> dict[str, float]:
    """Bytes by collective that an optimizer step of `accumulation` micro-batches gathers or reduces on several ranks.

    Counted is the larger end: the output of an all-gather, the input of a reduce-scatter.
    """
    trainable = traced.whole.trainable
    if strategy.is_fsdp:
        sharers = ranks // nodes if strategy.is_hsdp else ranks
        units = fsdp_units(traced, sharers)
        # The ends stay whole until the backward pass; the rest is gathered for each pass.
        gathered = sum(unit.gathered * (1 if part == "ends" else 2) for part, unit in units.items())
        reduced = sum(unit.reduced for unit in units.values())
        times = accumulation if sums_sharded(settings) else 1
        sent = {"all-gather": accumulation * gathered, "reduce-scatter": times * reduced}
        return sent | ({"all-reduce": reduced / sharers} if strategy.is_hsdp else {})  # once a step
    if strategy.is_zero3:
        recomputed = config.num_hidden_layers * traced.work.checkpointing
        return zero3_traffic(
            traced.parameters, config.hidden_size, ranks, accumulation, recomputed, traced.layer.parameters
        )
    if strategy.is_zero:
        return {"all-gather": zero_element(traced) * trainable, "reduce-scatter": accumulation * 4 * trainable}
    return {"all-reduce": 4 * trainable}


def zero_element(traced: Traced) -> int:
    """Bytes per number of the weights that ZeRO computes with; it reduces gradients in fp32 (`sum_in_fp32`)."""
    return 4 if traced.work.precision == "fp32" else 2


def zero3_traffic(
    parameters: tuple[Parameter, ...], hidden: int, ranks: int, accumulation: int, recomputed: int, layer: float,
    live: float = ZERO3_LIVE,
) -> dict[str, float]:  # fmt: skip
    """The same under ZeRO-3, which pads each parameter to a multiple of the ranks (`partition_parameters.py`).

    What is gathered as the forward pass ends is kept for the backward pass, and a layer of more than `live` numbers
    that is computed again is gathered again in part (`partitioned_param_coordinator.py`). Frozen layers are not kept:
    they are gathered for each pass, and a half of `live` less where layers are computed again (counted, not read).

    Args:
        hidden: the hidden size.
        recomputed: layers whose forward pass is computed again.
        layer: numbers of a layer.
    """
    numbers = reduced = persistent = 0.0
    gathered = dict.fromkeys(("layer", "embedding", "ends"), 0.0)
    for parameter in parameters:
        padded = math.ceil(parameter.numbers / ranks) * ranks
        reduced += parameter.trained * padded * 4
        if parameter.numbers <= ZERO3_PERSISTENT * hidden:
            persistent += padded * parameter.computed  # gathered once, after the optimizer step
        else:
            numbers += padded
            gathered[parameter.part] += padded * parameter.computed
    once = sum(gathered.values())
    kept = min(numbers, live) * once / numbers
    if all(parameter.trained for parameter in parameters):
        sent = 2 * once - kept + recomputed * max(0, layer - live) * once / numbers
    else:
        passes = 3 if recomputed else 2
        sent = passes * gathered["layer"] + 2 * gathered["ends"] + gathered["embedding"]
        sent -= kept / 2 if recomputed else 0.0
    return {"all-gather": accumulation * sent + persistent, "reduce-scatter": accumulation * reduced}
