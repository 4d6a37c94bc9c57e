"""Examples of one set or of a mixture, with the place each came from; and what a bad row does."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepladder.data import formats, hints
from stepladder.data.conversation import KNOWN_KEYS, RoleMap
from stepladder.data.readers import Found, quote
from stepladder.data.source import HEAD, Source
from stepladder.errors import DataError

COUNTED = 20  # bad rows that are counted before a load stops
SKIP = "on_bad_row: skip, which leaves bad rows out and lists them"
UNKNOWN_KEYS = "unknown_keys"
MOST_NAMES = 20  # unused columns, or keys of messages, that are named
LONG_NAME = 40  # characters from which a name is cut
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

    @classmethod
    def from_pairs(cls, name: str, pairs: list[tuple[formats.Example, str]]) -> Rows:
        return cls(name, [example for example, _ in pairs], [where for _, where in pairs])

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


class Remark(NamedTuple):
    """What a person should know of a set's rows, and what to do about it (may be empty)."""

    name: str  # for programs
    what: str
    help: str = ""

    def __str__(self) -> str:
        return self.what + f"; {self.help}" * bool(self.help)


class Converter:
    """Turns the rows of a set into examples, and counts what they hold that no example does.

    Args:
        label: what a person calls the set.
        shape: the shape of its rows; None where each row shows its own.
        role_map: the recipe's, if it has one.
    """

    def __init__(self, label: str, shape: formats.Shape | None, role_map: dict[str, str] | None = None):
        self.label, self.shape = label, shape
        self.role_map = RoleMap(role_map) if role_map else None
        self.columns: Counter[str] = Counter()  # rows, by column that is not used
        self.keys: Counter[str] = Counter()  # messages, by key without a known meaning
        self.column_map: dict[str, str] = {}  # that reads unused columns
        self.rows = 0
        self.present: Counter[str] = Counter()  # rows, by column of that map

    def example(self, where: str, row: formats.Row | DataError) -> formats.Example:
        """As `formats.to_example`; a fault in a row's stead is raised."""
        if isinstance(row, DataError):
            raise row
        shape = self.shape or formats.shape_of(row, where)
        example = formats.to_example(row, where, shape, self.role_map)
        self.count(row, shape, example)
        return example

    def count(self, row: formats.Row, shape: formats.Shape, example: formats.Example) -> None:
        """Count the columns of a row that are not used, and the keys of its messages that nobody knows."""
        self.rows += 1
        for column in formats.unused_columns(row, shape):
            if column not in self.columns:
                self.column_map = hints.for_unused(column, row[column], shape.used, row) | self.column_map
            self.columns[column] += 1
        for column in self.column_map.values():
            self.present[column] += column in row
        if "answers" in shape.columns and len(formats.listed_answers(row["answers"])) > 1:
            self.columns["answers, all but the first"] += 1
        for message in example.get("messages", ()):
            if len(message) > 2:
                self.keys.update(message.keys() - KNOWN_KEYS)

    def remarks(self, of: str = "") -> list[Remark]:
        """What was counted; `of` names the rows that were looked at where that is not the whole set."""
        found, place = [], f"{self.label}{of}"
        if self.columns:
            what = f"{place}: columns that are not used: {_names(self.columns, 'row')}"
            found.append(Remark("unused_columns", what, self._help()))
        if self.keys:
            what = f"{place}: keys of messages that only the chat template may use: {_names(self.keys, 'message')}"
            found.append(Remark(UNKNOWN_KEYS, what))
        if self.role_map and (absent := self.role_map.roles.keys() - self.role_map.seen):
            names = ", ".join(map(quote, sorted(absent, key=str)))
            what = f"{place}: role_map names {names}, which no conversation has"
            found.append(Remark("unused_roles", what))
        return found

    def _help(self) -> str:
        """The `column_map` that reads unused columns; it needs them in every row."""
        if not self.column_map:
            return ""
        read = [quote(column) for column in self.column_map.values() if column in self.columns]
        partial = any(self.present[column] < self.rows for column in self.column_map.values())
        return f"{hints.column_map(self.column_map)} reads {', '.join(read)}" + ", once every row has it" * partial


def _names(counts: Counter[str], unit: str) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{_name(name)} ({count:,} {unit}{'s' * (count != 1)})" for name, count in ranked[:MOST_NAMES]]
    return ", ".join(listed) + f" and {len(ranked) - MOST_NAMES:,} more" * (len(ranked) > MOST_NAMES)


def _name(name: str) -> str:
    return name if name.isprintable() and name.strip() and len(name) <= LONG_NAME else quote(name, LONG_NAME)


def collect(source: Source, skip_bad_rows: bool = False) -> Rows:
    """All rows of a set.

    Raises:
        DataError: a set that cannot be read; a bad row, unless they are skipped; no good row.
    """
    skipped: list[str] = []
    remarks: list[Remark] = []
    pairs = list(examples(source, skip_bad_rows, skipped, remarks))
    if not pairs:
        why = f"all {len(skipped)} are bad: {skipped[0]}"
        raise DataError(f"no row of {source.label} can be used", why=why, help=_help_of_first(source))
    rows = Rows.from_pairs(source.label, pairs)
    rows.skipped = skipped
    rows.sets = [{"name": source.label, "rows": len(rows), "of": len(rows), "share": 1.0}]
    if skipped:
        rows.notes.append(f"{len(skipped)} bad rows of {source.label} are skipped, the first at {skipped[0]}")
    # Message keys that the chat template does not read are reported as it renders (remarks.py).
    rows.notes += [str(remark) for remark in remarks if remark.name != UNKNOWN_KEYS]
    for example, where in pairs:
        if (length := _length(example)) > LONG:
            rows.notes.append(f"{where}: a row of {length:,} characters; is a line break missing?")
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
    head = list(itertools.islice(source.rows(), HEAD))
    converter = Converter(source.label, usual_shape(head), source.role_map)
    for where, row in head:
        _example(where, row, converter)
    return [str(remark) for remark in converter.remarks(f" (its first {len(head):,} rows)")]


def _length(example: formats.Example) -> int:
    if "text" in example:
        return len(example["text"])
    return sum(len(message["content"]) for message in example["messages"])


def examples(
    source: Source, skip_bad_rows: bool, skipped: list[str], remarks: list[Remark] | None = None
) -> Iterator[tuple[formats.Example, str]]:
    """The examples of a set, one by one; bad rows are appended to `skipped`, or raised.

    At the end, what the rows hold and no example does is appended to `remarks`.

    Raises:
        DataError: the first bad row, with the number of those that follow.
    """
    found = source.rows()
    head = list(itertools.islice(found, HEAD))
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
