"""What FSDP and ZeRO-3 pad, hold, gather and reduce of a model's parameters; checked by benchmarks/plan_scale.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepladder.planning.trace import Parameter, Traced
from stepladder.recipe.recipe import sums_sharded
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Strategy

# ZeRO-3 keeps a weight gathered if it is used again within so many weights (`stage3_max_reuse_distance`, the default of
# DeepSpeed), and for good if it is small (`stage3_param_persistence_threshold`: so many times the hidden size, which is
# Transformers' `auto`).
ZERO3_REUSE, ZERO3_PERSISTENT = 1e9, 10


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
    element = zero_element(traced)
    if strategy.is_zero3:
        return _zero3_traffic(traced, config, ranks, accumulation)
    if strategy.is_zero:
        return {"all-gather": element * trainable, "reduce-scatter": accumulation * element * trainable}
    return {"all-reduce": 4 * trainable}


def zero_element(traced: Traced) -> int:
    """Bytes per number of the gradients that ZeRO reduces: those of the precision that it computes in."""
    return 4 if traced.work.precision == "fp32" else 2


def _zero3_traffic(traced: Traced, config: Any, ranks: int, accumulation: int) -> dict[str, float]:
    """The same under ZeRO-3, which pads each parameter to a multiple of the ranks (`partition_parameters.py`)."""
    small = ZERO3_PERSISTENT * config.hidden_size
    gathered = reduced = kept = 0.0
    for parameter in traced.parameters:
        numbers = math.ceil(parameter.numbers / ranks) * ranks
        reduced += parameter.trained * numbers * zero_element(traced)
        if parameter.numbers <= small:
            kept += numbers * parameter.computed  # gathered once, after the optimizer step
        else:
            gathered += numbers * parameter.computed
    return {"all-gather": accumulation * 2 * gathered + kept, "reduce-scatter": accumulation * reduced}
