"""Which rows each rank trains in a step: to name them where one is at fault, and to prove that none is lost.

Their tokens are counted here too: TRL's `num_tokens` leaves out a part of an epoch's last
micro-batch on several ranks (accelerate's `gather_for_metrics` takes it for repeated rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from stepladder.data.render import IGNORED

MIX = 0x9E3779B97F4A7C15  # the multiplier of Fibonacci hashing: 2^64 by the golden ratio


class WithRows:
    """A collator whose batches carry the numbers of their rows: `rows` [sequences, most rows of one], -1 for none."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        most = max(len(example["rows"]) for example in examples)
        padded = [[*example["rows"], *[-1] * (most - len(example["rows"]))] for example in examples]
        batch["rows"] = torch.tensor(padded, dtype=torch.int64)
        return batch


class Rows:
    """The rows of this rank since the step began."""

    def __init__(self) -> None:
        self._batches: list[torch.Tensor] = []
        self.counts = torch.zeros(4, dtype=torch.int64)  # tokens, trained tokens, places, causal query–key pairs

    def add(self, inputs: dict[str, Any]) -> None:
        """Take the rows' numbers out of a batch, and count what it holds; empty rows, of one token, hold nothing."""
        rows, ids, mask = inputs.pop("rows"), inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None:
            lengths = mask.sum(dim=1)
            tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
        else:  # rows in one sequence, each counting its positions from 0
            tokens, pairs = torch.ones_like(ids).sum(), (inputs["position_ids"] + 1).sum()
        empty = (rows < 0).all(dim=1).sum()
        trained, places = (inputs["labels"][:, 1:] != IGNORED).sum(), torch.ones_like(ids).sum()
        # on the inputs' device: a GPU is not waited for until the step's end
        found = torch.stack([tokens - empty, trained, places, pairs - empty])
        self.counts = self.counts.to(found.device) + found
        self._batches.append(rows)

    def clear(self) -> None:
        self._batches, self.counts = [], torch.zeros(4, dtype=torch.int64)

    def numbers(self) -> list[int]:
        return [row for batch in self._batches for row in batch.flatten().tolist() if row >= 0]

    def of_all_ranks(self) -> list[int]:
        every: list[list[int]] = [self.numbers()]
        if dist.is_initialized():
            every = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, self.numbers())
        return [row for rows in every for row in rows]

    def checksum(self) -> int:
        """A number that sums up over batches, ranks and steps, whatever the order."""
        return sum(((row + 1) * MIX % 2**64) >> 40 for row in self.numbers())
