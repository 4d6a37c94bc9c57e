"""Which row is trained when: the same on any number of ranks, each row once an epoch.

Accelerate repeats rows to even out the ranks at an epoch's end, and a last short step makes the
curve depend on how it is cut. Here every epoch is a whole number of global batches: what lacks
is filled up with empty rows, whose one token trains nothing, and the loss is normalized by the
trained tokens of all ranks, so that they change nothing.

A step's rows are laid out from the longest to the shortest: those of alike length share a micro-batch,
which is padded less, and the micro-batches that the ranks take side by side are of alike size. The
step's gradient is a sum over its rows, whatever their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, Sampler

from stepladder.data.render import IGNORED
from stepladder.recipe.recipe import Layout

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


def empty_row(columns: Iterable[str], pad_token_id: int) -> Row:
    """A row of one token that trains nothing."""
    values: Row = {"input_ids": [pad_token_id], "labels": [IGNORED], "seq_lengths": [1], "rows": []}
    return {name: values[name] for name in columns}


def with_empty_row(dataset: Dataset, pad_token_id: int) -> Dataset:
    """`dataset` with one row more, the empty one, at its end.

    Tokens come as arrays, of which a batch is made four times as fast as of lists. Then there is nothing to gain by
    processes that fetch batches ahead: by default there are none (`dataloader_num_workers`), which would be forked
    beside CUDA and threads, and die of the signal by which Slurm asks a run to stop.
    """
    from datasets import Dataset, concatenate_datasets

    columns = {name: [value] for name, value in empty_row(dataset.column_names, pad_token_id).items()}
    whole = concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])
    return whole.with_format("numpy", columns=["input_ids", "labels"], output_all_columns=True)


class Order(Sampler[int]):
    """The order of the rows in each epoch: a permutation by seed and epoch, laid out over the micro-batches.

    Args:
        rows: how many rows hold data; the index `rows` is the empty row.
        layout: of an optimizer step.
        seed: of the permutation; the epoch is added to it.
        strategy: Transformers' `train_sampling_strategy`: random, sequential or group_by_length.
        lengths: tokens of each row.
        group: rows that are sorted by length together.
    """

    def __init__(self, rows: int, layout: Layout, seed: int, strategy: str, lengths: Sequence[int], group: int = 1):
        self.rows, self.layout, self.seed, self.strategy = rows, layout, seed, strategy
        self.lengths, self.group = lengths, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.rows // self.layout.rows)

    def __len__(self) -> int:
        return self.steps * self.layout.places

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.strategy != "sequential":
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        sizes = {self.group, self.layout.rows} if self.strategy == "group_by_length" else {self.layout.rows}
        for size in sorted(sizes, reverse=True):
            groups = (order[start : start + size] for start in range(0, self.rows, size))
            order = [i for rows in groups for i in sorted(rows, key=lambda i: -self.lengths[i])]
        for start in range(0, self.rows, self.layout.rows):
            yield from self.layout.spread(order[start : start + self.layout.rows], empty=self.rows)


class StepStream(IterableDataset):
    """The rows of a stream, laid out over the micro-batches as `Order` lays them out."""

    def __init__(self, rows: Iterable[Row], layout: Layout, pad_token_id: int):
        self.rows, self.layout, self.pad_token_id = rows, layout, pad_token_id

    def __iter__(self) -> Iterator[Row]:
        reading = iter(self.rows)
        while step := list(itertools.islice(reading, self.layout.rows)):
            step.sort(key=lambda row: -len(row["input_ids"]))
            held = [*step, empty_row(step[0], self.pad_token_id)]
            yield from (held[at] for at in self.layout.spread(range(len(step)), empty=len(step)))
