"""The rows of each optimizer step: the same on any number of ranks, each row once per epoch, counted as they train.

Accelerate repeats rows to even out the ranks at an epoch's end, and a last short step makes the
curve depend on how it is cut. Here every epoch is a whole number of global batches: what is missing
is filled up with padding rows, whose one token has no loss, and the loss is normalized by the
loss tokens of all ranks, so padding rows change nothing.

Within a step rows are sorted from the longest to the shortest: rows of similar length share a micro-batch,
which needs less padding, and the micro-batches that the ranks compute side by side are of similar size. The
step's gradient is a sum over its rows, so their order does not matter.

Batches carry the numbers of their rows: to name those of a failed step, and to prove that none is lost.
Tokens are counted here too: TRL's `num_tokens` leaves out a part of an epoch's last micro-batch on several
ranks (accelerate's `gather_for_metrics` takes it for repeated rows).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, Sampler

from stepladder.data.render import IGNORED
from stepladder.files import write_atomic
from stepladder.manifest import HELD_OUT_LOSSES
from stepladder.recipe.recipe import StepLayout

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from stepladder.run import Run

Row = dict[str, Any]
MOST_ROW_LOSSES = 100_000  # that a rank keeps and writes: 2 MB
MIX = 0x9E3779B97F4A7C15  # the multiplier of Fibonacci hashing: 2^64 by the golden ratio


def padding_row(columns: Iterable[str], pad_token_id: int) -> Row:
    """A row of one token without a loss."""
    values: Row = {"input_ids": [pad_token_id], "labels": [IGNORED], "seq_lengths": [1], "rows": []}
    return {name: values[name] for name in columns}


def with_padding_row(dataset: Dataset, pad_token_id: int) -> Dataset:
    """`dataset` with a padding row appended.

    Tokens come as arrays, which are collated four times as fast as lists. Worker processes (`dataloader_num_workers`)
    then gain nothing, and there are none by default: forked beside CUDA and threads, they would die of the signal
    by which Slurm asks a run to stop.
    """
    from datasets import Dataset, concatenate_datasets

    columns = {name: [value] for name, value in padding_row(dataset.column_names, pad_token_id).items()}
    extended = concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])
    return extended.with_format("numpy", columns=["input_ids", "labels"], output_all_columns=True)


class Order(Sampler[int]):
    """The order of the rows in each epoch: a permutation by seed and epoch, laid out over the micro-batches.

    Args:
        rows: how many rows hold data; the index `rows` is the padding row.
        layout: how an optimizer step is cut into micro-batches.
        seed: of the permutation; the epoch is added to it.
        strategy: Transformers' `train_sampling_strategy`: random, sequential or group_by_length.
        lengths: tokens of each row.
        group: rows that are sorted by length together.
    """

    def __init__(
        self,
        rows: int,
        layout: StepLayout,
        seed: int,
        strategy: str,
        lengths: Sequence[int] | np.ndarray,
        group: int = 1,
    ):
        self.rows, self.layout, self.seed, self.strategy = rows, layout, seed, strategy
        self.lengths, self.group = lengths, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.rows // self.layout.rows)

    def __len__(self) -> int:
        return self.steps * self.layout.places

    def __iter__(self) -> Iterator[int]:
        if self.strategy == "sequential":
            order = iter(range(self.rows))
        else:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = map(int, torch.randperm(self.rows, generator=generator).numpy())
        if self.strategy == "group_by_length" and self.group > self.layout.rows:
            order = itertools.chain.from_iterable(self._by_length(order, self.group))
        for rows in self._by_length(order, self.layout.rows):
            yield from self.layout.spread(rows, empty=self.rows)

    def _by_length(self, order: Iterator[int], size: int) -> Iterator[list[int]]:
        """The rows in groups of this size, the longest of each first."""
        while rows := list(itertools.islice(order, size)):
            yield sorted(rows, key=lambda row: -self.lengths[row])


class StepStream(IterableDataset):
    """The rows of a stream, laid out over the micro-batches as `Order` does."""

    def __init__(self, rows: Iterable[Row], layout: StepLayout, pad_token_id: int):
        self.rows, self.layout, self.pad_token_id = rows, layout, pad_token_id

    def __iter__(self) -> Iterator[Row]:
        stream = iter(self.rows)
        while step := sorted(itertools.islice(stream, self.layout.rows), key=lambda row: -len(row["input_ids"])):
            rows = [*step, padding_row(step[0], self.pad_token_id)]
            yield from (rows[at] for at in self.layout.spread(range(len(step)), empty=len(step)))


class RowNumberCollator:
    """Adds to a collator's batches the numbers of their rows: `rows` [sequences, most rows of one], -1 for none."""

    def __init__(self, collate: Callable[[list[Row]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[Row]) -> dict[str, Any]:
        batch = self.collate(examples)
        most = max(len(example["rows"]) for example in examples)
        padded = [[*example["rows"], *[-1] * (most - len(example["rows"]))] for example in examples]
        batch["rows"] = torch.tensor(padded, dtype=torch.int64)
        return batch


class RowLosses:
    """The loss of each evaluated row on this rank: its nats and loss tokens. Unknown ones are left out.

    In the run folder, held_out_losses.json holds those of the evaluation whose weights are the result, by which
    report.py compares runs row by row.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, int]] = {}

    def clear(self) -> None:
        self.found = {}

    @contextlib.contextmanager
    def collect(self, model: Any, rows: torch.Tensor | None, position_ids: torch.Tensor | None) -> Iterator[None]:
        """Take the losses of the batch that `model` is called on in the block.

        By a hook: TRL keeps the outputs to itself, and where it is asked for them calls the model once more.

        Args:
            rows: as `RowNumberCollator` gives them.
            position_ids: [1, tokens] where the rows lie end to end, each from 0.
        """
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            yield
        finally:
            hook.remove()
        if rows is not None and outputs and getattr(outputs[-1], "log_probs", None) is not None:
            self._add(rows, outputs[-1], position_ids)

    def _add(self, rows: torch.Tensor, outputs: Any, position_ids: torch.Tensor | None) -> None:
        """Take those of TRL's outputs, with `log_probs` and `label_mask` [sequences, tokens - 1]."""
        # on the host: Apple's GPU has no fp64
        nats, counts = -outputs.log_probs.cpu().double(), outputs.label_mask.cpu().double()
        numbers = [row for numbers in rows.tolist() for row in ([one for one in numbers if one >= 0] or [-1])]
        if len(nats) == len(numbers):
            sums = torch.stack([nats.sum(1), counts.sum(1)])
        elif position_ids is not None and len(nats) == 1 and int((position_ids == 0).sum()) == len(numbers):
            place = (position_ids[0].cpu() == 0).cumsum(0)[1:] - 1  # of the row that a label belongs to
            sums = nats.new_zeros(2, len(numbers)).index_add(1, place, torch.cat([nats, counts]))
        else:
            return
        self.found |= {
            row: (one, int(count))
            for row, one, count in zip(numbers, *sums.tolist(), strict=True)
            if row >= 0 and count and len(self.found) < MOST_ROW_LOSSES
        }

    def write(self, run: Run, step: int) -> None:
        """Write what all ranks have found; each of them calls it."""
        every: dict[int, tuple[float, int]] = {}
        for own in gather_object([self.found]):
            every |= own
        if run.is_writer:
            rows = sorted(every)
            nats, tokens = [round(every[row][0], 6) for row in rows], [every[row][1] for row in rows]
            content = {"step": step, "rows": rows, "nats": nats, "tokens": tokens}
            with contextlib.suppress(OSError):  # a full disk, which the metrics name
                write_atomic(run.folder / HELD_OUT_LOSSES, json.dumps(content, separators=(",", ":")) + "\n")


class StepRows:
    """The rows and counts of this rank since the step began."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._batches: list[torch.Tensor] = []
        self.counts = torch.zeros(4, dtype=torch.int64)  # tokens, loss tokens, slots, causal query–key pairs

    def add(self, inputs: dict[str, Any]) -> None:
        """Take the row numbers out of a batch and count its tokens; padding rows count as nothing."""
        rows, ids, mask = inputs.pop("rows"), inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None:
            lengths = mask.sum(dim=1)
            tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
        else:  # rows in one sequence, each counting its positions from 0
            tokens, pairs = torch.ones_like(ids).sum(), (inputs["position_ids"] + 1).sum()
        padding = (rows < 0).all(dim=1).sum()
        loss_tokens, slots = (inputs["labels"][:, 1:] != IGNORED).sum(), torch.ones_like(ids).sum()
        # on the device of the inputs: the GPU is not synchronized before the step's end
        counts = torch.stack([tokens - padding, loss_tokens, slots, pairs - padding])
        self.counts = self.counts.to(counts.device) + counts
        self._batches.append(rows)

    def numbers(self) -> list[int]:
        return [row for batch in self._batches for row in batch.flatten().tolist() if row >= 0]

    def gather_numbers(self) -> list[int]:
        """The row numbers of all ranks; every rank calls it."""
        gathered: list[list[int]] = [self.numbers()]
        if dist.is_initialized():
            gathered = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self.numbers())
        return [row for rows in gathered for row in rows]

    def checksum(self) -> int:
        """A sum over the rows, so it adds up over batches, ranks and steps in any order."""
        return sum(((row + 1) * MIX % 2**64) >> 40 for row in self.numbers())
