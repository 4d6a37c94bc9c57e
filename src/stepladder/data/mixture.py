"""The rows that a recipe asks for, from local files or the hub, in an order that no world size changes."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder.data import formats, read
from stepladder.errors import DataError
from stepladder.settings import Settings


@dataclass
class Rows:
    """Examples with the place each came from, and the fingerprint of their content."""

    name: str
    examples: list[formats.Example]
    where: list[str]

    def __len__(self) -> int:
        return len(self.examples)

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(example, sort_keys=True, ensure_ascii=False).encode())
        return {"name": self.name, "rows": len(self), "sha256": digest.hexdigest()}


def load(recipe: Settings) -> tuple[Rows, Rows | None]:
    """The training rows and, where the recipe evaluates, the evaluation rows.

    Raises:
        DataError: a file, row or column that cannot be used; the recipe names no data.
    """
    wants_eval = recipe.get("eval_strategy") != "no"
    train = _training_rows(recipe)
    evaluation = None
    if name := recipe.get("eval_dataset_name"):
        evaluation = from_name(name, None, recipe.get("dataset_test_split") if not read.is_local(name) else "train")
    elif share := recipe.get("test_split_size"):
        train, evaluation = _split(train, share, recipe.get("seed"))
    elif wants_eval and recipe.get("dataset_name") and not read.is_local(recipe.get("dataset_name")):
        evaluation = from_name(
            recipe.get("dataset_name"), recipe.get("dataset_config"), recipe.get("dataset_test_split")
        )
    if wants_eval and evaluation is None:
        raise DataError(
            f"eval_strategy is '{recipe.get('eval_strategy')}' and there is nothing to evaluate on",
            where=recipe.where("eval_strategy"),
            way_out='eval_dataset_name: FILE, or test_split_size: 0.1, or eval_strategy: "no"',
        )
    return train, evaluation


def _training_rows(recipe: Settings) -> Rows:
    if blocks := recipe.get("datasets"):
        parts = [_block(block, recipe) for block in blocks]
        return Rows(
            name=" + ".join(part.name for part in parts),
            examples=[example for part in parts for example in part.examples],
            where=[where for part in parts for where in part.where],
        )
    name = recipe.get("dataset_name")
    if not name:
        raise DataError(
            "the recipe names no data",
            where=recipe.where("dataset_name"),
            way_out="dataset_name: data/techco.jsonl, or datasets: …",
        )
    return from_name(name, recipe.get("dataset_config"), recipe.get("dataset_train_split"))


def _block(block: dict[str, Any], recipe: Settings) -> Rows:
    """One entry of `datasets`; `path: json` with `data_files` is how TRL names a local file."""
    name = block["path"]
    if name == "json" and isinstance(block.get("data_files"), str):
        name = block["data_files"]
    rows = from_name(name, block.get("name"), block.get("split", "train"))
    return rows


def from_name(name: str, config: str | None = None, split: str = "train") -> Rows:
    """The rows of one file or hub data set."""
    if read.is_local(name):
        pairs = list(read.read(Path(name)))
    else:
        pairs = [(f"{name}[{split}] row {i}", row) for i, row in enumerate(_from_hub(name, config, split), start=1)]
    return Rows(
        name=name,
        examples=[formats.to_example(row, where) for where, row in pairs],
        where=[where for where, _ in pairs],
    )


def _from_hub(name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's errors are of a dozen classes, all of them the user's to read
        raise DataError(
            f"the data set '{name}' (split {split}) could not be loaded",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            way_out="a local file needs its suffix (.jsonl); a hub id needs the network, or its cache",
        ) from None


def _split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Set aside a share of the rows, chosen by the seed alone."""
    count = round(len(rows) * share) if share < 1 else int(share)
    if not 0 < count < len(rows):
        raise DataError(f"test_split_size {share} of {len(rows)} rows leaves one side empty")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))

    def pick(wanted: bool) -> Rows:
        chosen = [i for i in range(len(rows)) if (i in held_out) == wanted]
        return Rows(rows.name, [rows.examples[i] for i in chosen], [rows.where[i] for i in chosen])

    return pick(False), pick(True)
