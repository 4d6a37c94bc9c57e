"""The global batch is the same on any number of ranks, whatever the micro-batch."""

from __future__ import annotations

import itertools

import pytest

from stepladder.errors import RecipeError
from stepladder.recipe.recipe import split_batch


@pytest.mark.parametrize("total", range(4, 26))
def test_each_step_holds_each_row_once(total: int) -> None:
    """Guards the curve where nothing divides: no row lost, none twice, no micro-batch over its size."""
    for micro, ranks, rows in itertools.product((1, 2, 3, 5), (1, 2, 3, 4), (total, total - 1, 1)):
        step = split_batch(total, micro, ranks)
        laid = list(step.spread(range(rows), empty=-1))
        assert len(laid) == step.places
        assert [item for item in laid if item >= 0] == list(range(rows))
        assert step.accumulation * micro * ranks - total < micro * ranks, "a whole round of micro-batches is empty"
        assert step.micro <= micro
        filled = [sum(item >= 0 for item in laid[at : at + step.micro]) for at in range(0, len(laid), step.micro)]
        assert max(filled) - min(filled) <= 1, "one rank would wait for another"


def test_no_empty_places_where_it_divides() -> None:
    """Guards the ladder: a micro-batch that one rank can hold is none too many for eight, which take what is there."""
    micros, ranks = (1, 2, 4, 16, 100), (1, 2, 4, 8)
    assert all(split_batch(64, micro, several).places == 64 for micro in micros for several in ranks)
    assert [split_batch(8, 8, several).micro for several in ranks] == [8, 4, 2, 1]


def test_fewer_rows_than_ranks_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        split_batch(2, 1, 4)
    assert "global_batch_size: 4" in caught.value.help and "--num_processes 2" in caught.value.help


@pytest.mark.parametrize(("total", "micro"), [(0, 1), (8, 0), (-8, 2)])
def test_refuses_sizes_below_one(total: int, micro: int) -> None:
    with pytest.raises(RecipeError):
        split_batch(total, micro, 1)
