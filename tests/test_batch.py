"""The global batch is the same on any number of ranks, or the error names what would work."""

from __future__ import annotations

import pytest

from stepladder.errors import RecipeError
from stepladder.recipe.batch import accumulation_steps


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_adds_up(ranks: int, micro: int) -> None:
    assert accumulation_steps(64, micro, ranks) * micro * ranks == 64


def test_names_the_nearest_values_that_work() -> None:
    with pytest.raises(RecipeError) as caught:
        accumulation_steps(22, 4, 2)
    assert "16 or 24" in caught.value.way_out
    assert "per_device_train_batch_size: 1 or 11" in caught.value.way_out


def test_every_suggestion_works() -> None:
    """Guards the way out: a suggested value that fails again would be worse than none."""
    for total in range(1, 40):
        for micro in range(1, 9):
            for ranks in (1, 2, 3, 4):
                try:
                    accumulation_steps(total, micro, ranks)
                except RecipeError as error:
                    batch, _, micros = error.way_out.partition(", or per_device_train_batch_size: ")
                    for value in batch.removeprefix("global_batch_size: ").split(" or "):
                        accumulation_steps(int(value), micro, ranks)
                    for value in filter(None, micros.split(" or ")):
                        accumulation_steps(total, int(value), ranks)


@pytest.mark.parametrize(("total", "micro"), [(0, 1), (8, 0), (-8, 2)])
def test_refuses_sizes_below_one(total: int, micro: int) -> None:
    with pytest.raises(RecipeError):
        accumulation_steps(total, micro, 1)
