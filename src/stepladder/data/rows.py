"""Examples of one set or of a mixture, with the place each came from; and what a bad row does."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stepladder.data import formats
from stepladder.data.readers import Found
from stepladder.data.source import HEAD, Source
from stepladder.errors import DataError

COUNTED = 20  # bad rows that are counted before a load stops
LONG = 1_000_000  # characters: about 250,000 tokens, more than any usual max_length


@dataclass
class Rows:
    """Examples held in memory.

    `skipped` lists the bad rows that were left out (`file:line: what`), `notes` holds what a person
    should be told, and `sets` how many of its rows each set of a mixture gives, and their share.
    """

    name: str
    examples: list[formats.Example]
    where: list[str]
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sets: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, chosen: Iterable[int]) -> Rows:
        """The rows at these positions."""
        picked = list(chosen)
        examples, where = [self.examples[i] for i in picked], [self.where[i] for i in picked]
        return Rows(self.name, examples, where, self.skipped, self.notes, self.sets)

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """Several sets one after the other, with the share that each of them has."""
        total = sum(map(len, parts))
        return cls(
            name=" + ".join(part.name for part in parts),
            examples=[example for part in parts for example in part.examples],
            where=[where for part in parts for where in part.where],
            skipped=[line for part in parts for line in part.skipped],
            notes=[note for part in parts for note in part.notes],
            sets=[{**part.sets[0], "rows": len(part), "share": round(len(part) / total, 6)} for part in parts if total],
        )

    def fingerprint(self) -> dict[str, Any]:
        """Name, number and SHA-256 of the examples in their order; skipped rows; the sets' shares."""
        skipped = {"skipped": len(self.skipped), "skipped_rows": self.skipped}
        return {"name": self.name, **digest(self.examples), **skipped, "sets": self.sets}


def digest(examples: Iterable[formats.Example]) -> dict[str, Any]:
    """The number of examples, and the SHA-256 of their canonical JSON."""
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    content, count, rest = hashlib.sha256(), 0, iter(examples)
    while chunk := list(itertools.islice(rest, 1000)):  # a call of the encoder costs more than a row
        content.update(encode(chunk).encode())
        count += len(chunk)
    return {"rows": count, "sha256": content.hexdigest()}


def collect(source: Source, skip_bad_rows: bool = False) -> Rows:
    """All rows of a set.

    Raises:
        DataError: a set that cannot be read; a bad row, unless they are skipped; no good row.
    """
    skipped: list[str] = []
    pairs = list(examples(source, skip_bad_rows, skipped))
    if not pairs:
        raise DataError(f"no row of {source.label} can be used", why=f"all {len(skipped)} are bad: {skipped[0]}")
    rows = Rows(source.label, [example for example, _ in pairs], [where for _, where in pairs], skipped)
    rows.sets = [{"name": source.label, "rows": len(rows), "of": len(rows), "share": 1.0}]
    if skipped:
        rows.notes.append(f"{len(skipped)} bad rows of {source.label} are skipped, the first at {skipped[0]}")
    for example, where in pairs:
        if (length := _length(example)) > LONG:
            rows.notes.append(f"{where}: a row of {length:,} characters; is a line break missing?")
    return rows


def _length(example: formats.Example) -> int:
    if "text" in example:
        return len(example["text"])
    return sum(len(message["content"]) for message in example["messages"])


def examples(source: Source, skip_bad_rows: bool, skipped: list[str]) -> Iterator[tuple[formats.Example, str]]:
    """The examples of a set, one by one; bad rows are appended to `skipped`, or raised.

    Raises:
        DataError: the first bad row, with the number of those that follow.
    """
    found = source.rows()
    head = list(itertools.islice(found, HEAD))
    found = itertools.chain(head, found)
    shape = usual_shape(head)
    for where, row in found:
        example = _example(where, row, shape)
        if isinstance(example, DataError):
            if not skip_bad_rows:
                raise _with_those_that_follow(example, found, shape)
            skipped.append(f"{example.where}: {example.what}")
        else:
            yield example, where


def usual_shape(head: list[Found]) -> formats.Shape:
    """The shape that most of a set's first rows have: it is the others that are wrong.

    Raises:
        DataError: none of them has a known shape.
    """
    shapes: Counter[formats.Shape] = Counter()
    fault: DataError | None = None
    for where, row in head:
        try:
            if isinstance(row, DataError):
                raise row
            shapes[formats.shape_of(row, where)] += 1
        except DataError as error:
            fault = fault or error
    if not shapes and fault:
        raise fault
    return shapes.most_common(1)[0][0]


def _example(where: str, row: formats.Row | DataError, shape: formats.Shape) -> formats.Example | DataError:
    if isinstance(row, DataError):
        return row
    try:
        return formats.to_example(row, where, shape)
    except DataError as error:
        return error


def _with_those_that_follow(first: DataError, rest: Iterator[Found], shape: formats.Shape) -> DataError:
    """The first fault, with the number of further bad rows: one slip, or a file of another kind?"""
    bad = (where for where, row in rest if isinstance(_example(where, row, shape), DataError))
    try:
        others = list(itertools.islice(bad, COUNTED))
    except DataError:  # the file cannot be read to its end either; the first fault stands
        others = []
    why = first.why
    if others:
        number = f"at least {COUNTED}" if len(others) == COUNTED else str(len(others))
        rows = "row follows" if len(others) == 1 else "rows follow"
        why = f"{why}; " * bool(why) + f"{number} more bad {rows}, the next at {others[0]}"
    way_out = (
        f"{first.way_out}; or " * bool(first.way_out) + "on_bad_row: skip, which leaves bad rows out and lists them"
    )
    return DataError(first.what, where=first.where, why=why, way_out=way_out)
