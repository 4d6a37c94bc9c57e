"""Which row is trained when: the same on any number of ranks, each row once an epoch.

Accelerate repeats rows to even out the ranks at an epoch's end, and a last short step makes the
curve depend on how it is cut. Here every epoch is a whole number of global batches: what lacks
is filled up with empty rows, whose one token trains nothing, and the loss is normalized by the
trained tokens of all ranks, so that they change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from stepladder.data.render import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


def pad_rows(dataset: Dataset, multiple: int, pad_token_id: int) -> Dataset:
    """`dataset` with empty rows at its end, so that its length is a multiple of `multiple`."""
    from datasets import Dataset, concatenate_datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    empty: dict[str, Any] = {"input_ids": [pad_token_id], "labels": [IGNORED], "seq_lengths": [1], "row": -1}
    columns = {name: [empty[name]] * missing for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])


class Order(Sampler[int]):
    """The order of the rows in each epoch: a permutation by seed and epoch, then the empty rows.

    Args:
        rows: how many rows hold data; the indices from here to `length` are empty rows.
        length: all rows, a multiple of the global batch.
        seed: of the permutation; the epoch is added to it.
        strategy: Transformers' `train_sampling_strategy`: random, sequential or group_by_length.
        lengths: tokens of each row, for group_by_length.
        group: rows that are sorted by length together: many global batches.
    """

    def __init__(
        self, rows: int, length: int, seed: int, strategy: str, lengths: list[int] | None = None, group: int = 1
    ):
        self.rows, self.length, self.seed, self.strategy = rows, length, seed, strategy
        self.lengths, self.group = lengths, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.strategy != "sequential":
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        if self.strategy == "group_by_length" and self.lengths:
            lengths = self.lengths
            groups = [order[start : start + self.group] for start in range(0, self.rows, self.group)]
            order = [i for rows in groups for i in sorted(rows, key=lambda i: -lengths[i])]
        yield from order
        yield from range(self.rows, self.length)
