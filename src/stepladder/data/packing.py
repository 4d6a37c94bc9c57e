"""Several rows in one sequence, none of which sees another's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepladder.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def packed(dataset: Dataset | IterableDataset, settings: Settings, packs: bool) -> Dataset | IterableDataset:
    """`dataset` as training reads it: shuffled where `shuffle_dataset` is set, packed by TRL where `packs` is.

    A packed row's `rows` are the rows in it, and `seq_lengths` their lengths, by which attention
    keeps them apart (`packing_strategy: wrapped` cuts rows anywhere and has none).
    """
    from trl import pack_dataset

    def shuffled(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        return rows.shuffle(seed=settings.get("seed")) if settings.get("shuffle_dataset") else rows

    if not packs:
        return shuffled(dataset)
    # TRL packs lists of one length together: each token carries its row's number through it.
    dataset = shuffled(dataset).map(_for_each_token, batched=True)
    dataset = pack_dataset(dataset, settings.get("max_length"), settings.get("packing_strategy"))
    return shuffled(dataset.map(_for_each_sequence, batched=True))


def _for_each_token(batch: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(batch["rows"], batch["input_ids"], strict=True)
    return {"rows": [row * len(ids) for row, ids in pairs]}


def _for_each_sequence(batch: dict[str, Any]) -> dict[str, Any]:
    return {"rows": [list(dict.fromkeys(rows)) for rows in batch["rows"]]}
