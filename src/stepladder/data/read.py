"""Files to rows, each row with the place it came from (`file:line`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json")


def is_local(name: str) -> bool:
    """A file that is there, or a name that can only be meant as one; anything else is a hub id."""
    return Path(name).exists() or Path(name).suffix in SUFFIXES


def read(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a local file, in their order.

    Raises:
        DataError: no such file, an unknown kind, invalid JSON (with its line), or no row at all.
    """
    if not path.exists():
        raise DataError(f"there is no data file {path}", way_out="paths are relative to the folder you start from")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: files of the kind '{path.suffix}' are not read", way_out=f"one of {SUFFIXES}")
    empty = True
    for item in _read_json(path) if path.suffix == ".json" else _read_jsonl(path):
        empty = False
        yield item
    if empty:
        raise DataError(f"{path} holds no rows", way_out='one JSON object a line: {"input": "…", "output": "…"}')


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"not UTF-8 at byte {error.start + 1}", where=where, way_out="save it as UTF-8"
                ) from None
            if text:
                yield where, _object(text, where)


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"invalid JSON: {error}", where=f"{path}:{line}", way_out="a list of objects") from None
    if not isinstance(rows, list):
        raise DataError("a JSON data file is a list of objects", where=str(path), way_out="[{…}, {…}], or JSONL")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError("not an object", where=f"{path}: row {number}", way_out='{"input": "…", "output": "…"}')
        yield f"{path}: row {number}", row


def _object(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"invalid JSON: {error}",
            where=where,
            way_out='one JSON object a line: {"input": "…", "output": "…"}',
        ) from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object", where=where, way_out='{"input": "…", "output": "…"}')
    return row
