"""Sets larger than memory: rows read anew at each pass, in an order that the seed alone decides."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from stepladder.data import rows
from stepladder.data.formats import Example
from stepladder.data.source import Source

SHUFFLE_BUFFER = 10_000  # rows held while shuffling
Item = tuple[Example, str]


@dataclass
class Stream:
    """Sets that are read row by row. Iterating gives `(example, where)`; nothing else is held.

    With `weights`, each next row comes from a set drawn by its weight, until one of them is at its
    end: none repeats. Without, all rows of all sets come. `counts` are the most rows taken of each.
    """

    name: str
    sources: list[Source]
    counts: list[int | None]
    weights: list[float] | None
    seed: int
    skip_bad_rows: bool = False
    skipped: list[str] = field(default_factory=list)  # the bad rows that the latest pass left out
    left_out: dict[str, None] = field(default_factory=dict)  # rows that could not be rendered, in whichever pass
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Item]:
        return self.read()

    def read(self, epoch: int = 0) -> Iterator[Item]:
        """One pass in the order of an epoch: the same on every rank and at every repetition.

        Raises:
            DataError: as `rows.examples`.
        """
        draw = random.Random(f"{self.seed}:{epoch}")
        buffer: list[Item] = []
        for _, item in self._mixed():
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(item)
                continue
            at = draw.randrange(SHUFFLE_BUFFER)
            yield buffer[at]
            buffer[at] = item
        draw.shuffle(buffer)
        yield from buffer

    def _mixed(self) -> Iterator[tuple[int, Item]]:
        """The rows with the number of their set: which ones come does not depend on the epoch."""
        self.skipped = []
        streams = [
            itertools.islice(rows.examples(source, self.skip_bad_rows, self.skipped), count)
            for source, count in zip(self.sources, self.counts, strict=True)
        ]
        if self.weights is None:
            yield from ((number, item) for number in range(len(streams)) for item in streams[number])
            return
        draw = random.Random(f"{self.seed}:mix")
        while True:
            (number,) = draw.choices(range(len(streams)), self.weights)
            item = next(streams[number], None)
            if item is None:
                return
            yield number, item

    def fingerprint(self) -> dict[str, Any]:
        """As that of `Rows`, by one pass over local files, which also finds their bad rows before the run.

        Sets on the hub are not read for it: their rows and hash are None.
        """
        taken: Counter[int] = Counter()

        def examples() -> Iterator[Example]:
            for number, (example, _) in self._mixed():
                taken[number] += 1
                yield example

        known: dict[str, Any] = {"rows": None, "sha256": None}
        if all(source.local for source in self.sources):
            known = rows.digest(examples())
        sets = [
            {"name": source.label, "rows": taken[number], "share": round(taken[number] / taken.total(), 6)}
            for number, source in enumerate(self.sources)
            if taken
        ]
        skipped = {"skipped": len(self.skipped), "skipped_rows": self.skipped}
        return {"name": self.name, **known, **skipped, "sets": sets}
