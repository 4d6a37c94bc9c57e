"""What a strategy cannot compute as one process does is refused, or said."""

from __future__ import annotations

import pytest

from stepladder.errors import RecipeError
from stepladder.recipe.schema import known_keys
from stepladder.training import strategy
from stepladder.training.ranks import Launch


def under(name: str, ranks: int = 2) -> Launch:
    return Launch(ranks=ranks, rank=0, local_rank=0, local_ranks=ranks, strategy=name)


@pytest.mark.parametrize("optimizer", known_keys()["optim"].choices)
def test_every_optimizer_is_known_to_be_safe_noted_or_refused_under_zero(optimizer, settings) -> None:
    """Guards against an optimizer of a new TRL that passes unseen: what is not known to be elementwise is refused."""
    recipe = settings(optim=optimizer)
    try:
        notes = strategy.check(recipe, under("zero3"))
    except RecipeError as error:
        assert optimizer in error.what and optimizer not in strategy.ELEMENTWISE
    else:
        assert (optimizer in strategy.ELEMENTWISE) != bool(notes)
    for name in ("single", "ddp", "fsdp", "fsdp_offload"):
        assert not strategy.check(recipe, under(name)), "only ZeRO cuts matrices into slices"


def test_an_8_bit_base_is_noted_on_several_ranks(settings) -> None:
    recipe = settings(load_in_8bit=True, use_peft=True)
    assert not strategy.check(recipe, under("single", ranks=1))
    (note,) = strategy.check(recipe, under("ddp"))
    assert "load_in_8bit" in note and "load_in_4bit" in note
