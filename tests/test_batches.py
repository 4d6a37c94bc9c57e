"""Which row is trained when: each once an epoch, those of alike length side by side, the same for a stream."""

from __future__ import annotations

import itertools
import random

import pytest

from stepladder.recipe.recipe import split_batch
from stepladder.training.batches import Order, StepStream

ROWS, GLOBAL = 21, 8
LENGTHS = random.Random(0).choices(range(5, 500), k=ROWS)


def steps(order: list[int], micro: int, ranks: int) -> list[list[int]]:
    places = split_batch(GLOBAL, micro, ranks).places
    return [order[start : start + places] for start in range(0, len(order), places)]


def padded(step: list[int], micro: int) -> int:
    """Places that the step's batches have, of the rows that hold data."""
    rows = [[LENGTHS[row] for row in step[at : at + micro] if row < ROWS] for at in range(0, len(step), micro)]
    return sum(max(row) * len(row) for row in rows if row)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (2, 1), (1, 1), (2, 3), (1, 4)])
def test_a_step_has_the_same_rows_however_it_is_cut(strategy: str, micro: int, ranks: int) -> None:
    """Guards the same curve: cutting and sorting move rows within their step only, and lose none of an epoch."""
    whole = steps(list(Order(ROWS, split_batch(GLOBAL, GLOBAL, 1), 3, strategy, LENGTHS, 2 * GLOBAL)), GLOBAL, 1)
    cut = steps(list(Order(ROWS, split_batch(GLOBAL, micro, ranks), 3, strategy, LENGTHS, 2 * GLOBAL)), micro, ranks)
    assert [{*step} - {ROWS} for step in cut] == [{*step} - {ROWS} for step in whole]
    assert sorted(row for row in itertools.chain(*cut) if row < ROWS) == list(range(ROWS))


@pytest.mark.parametrize(("micro", "ranks"), [(4, 1), (2, 2)])
def test_rows_of_alike_length_share_a_micro_batch(micro: int, ranks: int) -> None:
    """Guards what sorting is for: fewer places of padding, and ranks that work side by side on alike batches."""
    order = list(Order(ROWS, split_batch(GLOBAL, micro, ranks), 3, "random", LENGTHS))
    for step in steps(order, micro, ranks):
        known = [LENGTHS[row] for row in step if row < ROWS]
        assert known == sorted(known, reverse=True)
    blind = list(Order(ROWS, split_batch(GLOBAL, micro, ranks), 3, "random", [0] * ROWS))
    assert sum(padded(step, micro) for step in steps(order, micro, ranks)) < sum(
        padded(step, micro) for step in steps(blind, micro, ranks)
    )


def test_a_stream_is_laid_out_like_rows_that_are_known() -> None:
    """Guards against a streamed run on another curve than the same rows read whole."""
    cut = split_batch(GLOBAL, 2, 2)
    rows = [{"input_ids": [7] * length, "labels": [7] * length, "rows": [i]} for i, length in enumerate(LENGTHS)]
    streamed = [(row["rows"] or [ROWS])[0] for row in StepStream(rows, cut, pad_token_id=0)]
    assert streamed == list(Order(ROWS, cut, 0, "sequential", LENGTHS))
