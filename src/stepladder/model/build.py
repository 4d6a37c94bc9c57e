"""The changes to a loaded model before it trains, in the one order that they may come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepladder.model import adapter, load
from stepladder.model.attention import Choice
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Attend = Callable[["PreTrainedModel"], tuple[Choice, list[str]]]


@dataclass(frozen=True)
class Built:
    """A model with its adapter, how it attends, and notes for the run's opening lines."""

    model: PreTrainedModel
    attention: Choice
    notes: list[str]


def build(
    base: PreTrainedModel,
    recipe: Settings,
    precision: str,
    attend: Attend,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[str] = (),
    sharded: bool = False,
    on_cpu: bool = False,
) -> Built:
    """Make a loaded base the model that trains: embeddings, attention, adapter, and the precision of held weights.

    Embeddings come before the adapter, which would wrap the smaller ones. Attention comes before it too, since it is
    chosen by the base's layers. Weights are held in the precision of the products last, since only then is known
    which of them are frozen. What is made for CPUs follows TRL's fused output layer, which the trainer adds
    (`cpu_kernels.speed_up`).

    Args:
        attend: `attention.settle` with all but the model.
        tokenizer: of the run; None in a plan, which knows neither added tokens nor an adapter's weights.
        new_tokens: tokens that a template added to the vocabulary.
        sharded: whether the strategy itself holds what is computed with (ZeRO, FSDP).
        on_cpu: whether it computes there, where LoRA's layers are those of `cpu_kernels`.

    Raises:
        ModelError, RecipeError: as `attend` and `adapter.attach`.
    """
    notes: list[str] = []
    if tokenizer is not None and (ends := load.fit_embeddings(base, tokenizer)):
        notes.append(f"an answer ends at {' or '.join(ends)} too: so the chat template or the tokenizer has it")
    choice, costs = attend(base)
    model = adapter.attach(base, recipe, tokenizer, new_tokens, fused=on_cpu and not sharded)
    if not sharded:
        adapter.hold_as_computed(model, precision)
    return Built(model, choice, notes + costs)
