"""Examples of a set, held in a file or streamed, with the place each came from; and what a bad row does.

A row is known by its key, which is made of its text.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepladder.data import formats
from stepladder.data.columns import UNKNOWN_KEYS, Converter, Remark, usual_shape
from stepladder.data.conversation import REASONING
from stepladder.data.file_list import FileList, join, take
from stepladder.data.readers import Found
from stepladder.data.source import SAMPLED_ROWS, Source
from stepladder.errors import DataError

COUNTED = 20  # bad rows that are counted before a load stops
SKIP = "on_bad_row: skip, which leaves bad rows out and lists them"
LISTED = 10_000  # rows left out that run.json names: it is read whole, so it stays small
SHUFFLE_BUFFER = 10_000  # rows of a stream that are held while shuffling
LONG_ANSWER = 40  # characters, wide ones counted as WIDE
WIDE = 3  # characters that a wide one (Chinese, Japanese, Korean) counts as: about as much as it says
LONG = 1_000_000  # characters: about 250,000 tokens, more than any usual max_length
Item = tuple[formats.Example, str]


@dataclass
class Rows:
    """Examples, where each came from, and what is known of them as a set: neither changes.

    `skipped` lists the bad rows that were left out (`file:line: what`), `notes` holds what a person
    should be told, and `sets` how many of its rows each set of a mixture gives, and their share.
    """

    name: str
    examples: Sequence[formats.Example]
    where: Sequence[str]
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sets: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, chosen: Iterable[int]) -> Rows:
        """The rows at these positions."""
        picked = array("Q", chosen)
        examples, where = take(self.examples, picked), take(self.where, picked)
        return Rows(self.name, examples, where, self.skipped, self.notes, self.sets)

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """Several sets one after the other, with the share that each of them has."""
        total = sum(map(len, parts))
        return cls(
            name=" + ".join(part.name for part in parts),
            examples=join([part.examples for part in parts]),
            where=join([part.where for part in parts]),
            skipped=[line for part in parts for line in part.skipped],
            notes=[note for part in parts for note in part.notes],
            sets=[{**part.sets[0], "rows": len(part), "share": round(len(part) / total, 6)} for part in parts if total],
        )

    @classmethod
    def from_pairs(cls, name: str, pairs: list[tuple[formats.Example, str]]) -> Rows:
        return cls(name, [example for example, _ in pairs], [where for _, where in pairs])

    def fingerprint(self) -> dict[str, Any]:
        """Name, number and SHA-256 of the examples in their order; skipped rows; the sets' shares."""
        skipped = {"skipped": len(self.skipped), "skipped_rows": self.skipped[:LISTED]}
        return {"name": self.name, **self._digest, **skipped, "sets": self.sets}

    @functools.cached_property
    def _digest(self) -> dict[str, Any]:
        return digest(self.examples)


def digest(examples: Iterable[formats.Example]) -> dict[str, Any]:
    """The number of examples, and the SHA-256 of their canonical JSON."""
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    content, count = hashlib.sha256(), 0
    for count, example in enumerate(examples, start=1):  # lists of a thousand
        before = ", " if count % 1000 != 1 else "][" if count > 1 else "["
        content.update((before + encode(example)).encode())
    content.update(b"]" if count else b"")
    return {"rows": count, "sha256": content.hexdigest()}


def collect(source: Source, skip_bad_rows: bool = False) -> Rows:
    """All rows of a set.

    Raises:
        DataError: a set that cannot be read; a bad row, unless they are skipped; no good row.
    """
    skipped: list[str] = []
    remarks: list[Remark] = []
    found, places, long = FileList[formats.Example](), FileList[str](), []
    for example, where in examples(source, skip_bad_rows, skipped, remarks):
        found.append(example)
        places.append(where)
        length = len(example.get("text", "")) + sum(len(message["content"]) for message in example.get("messages", ()))
        if length > LONG:
            long.append(f"{where}: a row of {length:,} characters; is a line break missing?")
    if not found:
        why = f"all {len(skipped)} are bad: {skipped[0]}"
        raise DataError(f"no row of {source.label} can be used", why=why, help=_help_of_first(source))
    rows = Rows(source.label, found, places, skipped)
    rows.sets = [{"name": source.label, "rows": len(rows), "of": len(rows), "share": 1.0}]
    if skipped:
        rows.notes.append(f"{len(skipped)} bad rows of {source.label} are skipped, the first at {skipped[0]}")
    # Message keys that the chat template does not read are reported as it renders (row_renderer.py).
    rows.notes += [str(remark) for remark in remarks if remark.name != UNKNOWN_KEYS] + long
    return rows


def _help_of_first(source: Source) -> str:
    try:
        next(examples(source, False, []))
    except DataError as error:
        return error.help.removesuffix(SKIP).removesuffix("; or ")
    return ""


def head_notes(source: Source) -> list[str]:
    """What the first rows of a set show that a person should know; bad rows are left to whoever reads on.

    Raises:
        DataError: a set that cannot be read, or none of whose first rows has a known shape.
    """
    head = list(itertools.islice(source.rows(), SAMPLED_ROWS))
    converter = Converter(source.label, usual_shape(head), source.role_map)
    for where, row in head:
        _example(where, row, converter)
    return [str(remark) for remark in converter.remarks(f" (its first {len(head):,} rows)")]


def examples(
    source: Source, skip_bad_rows: bool, skipped: list[str], remarks: list[Remark] | None = None
) -> Iterator[tuple[formats.Example, str]]:
    """The examples of a set, one by one; bad rows are appended to `skipped`, or raised.

    At the end, what the rows hold and no example does is appended to `remarks`.

    Raises:
        DataError: the first bad row, with the number of those that follow.
    """
    found = source.rows()
    head = list(itertools.islice(found, SAMPLED_ROWS))
    found = itertools.chain(head, found)
    shape = usual_shape(head)
    for new, old in (source.column_map or {}).items():
        if new not in shape.used:
            raise DataError(
                f"column_map reads '{old}' as '{new}', which rows of the shape {shape} have no use for",
                where=source.where,
                why=f"{source.label} has the columns {shape}, which come first",
                help="another column_map, or columns: […] without those",
            )
    converter = Converter(source.label, shape, source.role_map)
    for where, row in found:
        example = _example(where, row, converter)
        if isinstance(example, DataError):
            if not skip_bad_rows:
                raise _with_those_that_follow(example, found, converter)
            skipped.append(f"{example.where}: {example.what}")
        else:
            yield example, where
    if remarks is not None:
        remarks += converter.remarks()


def _example(where: str, row: formats.Row | DataError, converter: Converter) -> formats.Example | DataError:
    try:
        return converter.example(where, row)
    except DataError as error:
        return error


def _with_those_that_follow(first: DataError, rest: Iterator[Found], converter: Converter) -> DataError:
    """The first fault, with the number of further bad rows: one slip, or a file of another kind?"""
    bad = (where for where, row in rest if isinstance(_example(where, row, converter), DataError))
    try:
        others = list(itertools.islice(bad, COUNTED))
    except DataError:  # the file cannot be read to its end either; the first fault stands
        others = []
    why = first.why
    if others:
        number = f"at least {COUNTED}" if len(others) == COUNTED else str(len(others))
        rows = "row follows" if len(others) == 1 else "rows follow"
        why = f"{why}; " * bool(why) + f"{number} more bad {rows}, the next at {others[0]}"
    help = f"{first.help}; or " * bool(first.help) + SKIP
    return DataError(first.what, where=first.where, why=why, help=help)


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
            DataError: as `examples`.
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
            itertools.islice(examples(source, self.skip_bad_rows, self.skipped), count)
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

        def count_sets() -> Iterator[formats.Example]:
            for number, (example, _) in self._mixed():
                taken[number] += 1
                yield example

        known: dict[str, Any] = {"rows": None, "sha256": None}
        if all(source.local for source in self.sources):
            known = digest(count_sets())
        sets = [
            {"name": source.label, "rows": taken[number], "share": round(taken[number] / taken.total(), 6)}
            for number, source in enumerate(self.sources)
            if taken
        ]
        skipped = {"skipped": len(self.skipped), "skipped_rows": self.skipped[:LISTED]}
        return {"name": self.name, **known, **skipped, "sets": sets}


def role_text(example: formats.Example, *roles: str) -> str:
    """What these roles say in an example, reasoning and tool calls included; a plain text is the assistant's."""
    if "text" in example:
        return str(example["text"]) if "assistant" in roles else ""
    texts = []
    for message in example["messages"]:
        if message["role"] in roles:
            reasoning = "".join(f"{message[key]}\n" for key in REASONING if key in message)
            calls = message.get("tool_calls")
            texts.append(reasoning + message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else ""))
    return "\n".join(texts)


def all_text(example: formats.Example) -> str:
    return role_text(example, "system", "developer", "user", "tool", "assistant")


def width(text: str) -> int:
    """Characters, each wide one counted as `WIDE`."""
    if text.isascii():
        return len(text)
    return len(text) + (WIDE - 1) * sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def normal_text(example: formats.Example) -> str:
    """All that a row gives to the model, case and blanks apart."""
    beside = [example.get(key) for key in formats.BESIDE_MESSAGES]
    return _plain(all_text(example)) + (json.dumps(beside, sort_keys=True) if any(beside) else "")


def own_text(example: formats.Example) -> str:
    """What a row says of its own: many rows share one system prompt, and are no copies for that."""
    return _plain(role_text(example, "user", "tool", "assistant"))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def row_key(example: formats.Example) -> str:
    """What a row is known by: the start of a SHA-256 of its text, case and blanks apart (48 bits, hexadecimal).

    Of a row with a long answer these are the words of user, tool and assistant, so that another system prompt
    makes no other row of it; of any other it is all that the model is given.
    """
    has_long_answer = width(role_text(example, "assistant")) >= LONG_ANSWER
    text = own_text(example) if has_long_answer else normal_text(example)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def row_keys(examples: Iterable[formats.Example]) -> set[str]:
    return {row_key(example) for example in examples}
