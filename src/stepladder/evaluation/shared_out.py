"""Work shared out over the ranks of `accelerate launch`, with the same result on any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from stepladder.errors import StepladderError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(batches: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
    """The results of all batches, in their order, on every rank; rank r of n does batches r, r + n, ….

    The batches are made before they are shared out: a row meets the same padding, and so the same
    rounding, on any number of ranks.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [work(batch) for batch in batches]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine, fault = [], None
    try:
        mine = [work(batch) for batch in batches[rank::ranks]]
    except StepladderError as error:  # one rank's endpoint may fail alone: none is left waiting for the others
        fault = error
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, (mine, fault))
    for _, found in parts:
        if found:
            raise found
    rounds = zip_longest(*(done for done, _ in parts))
    return [result for results in rounds for result in results][: len(batches)]
