"""One local file to its rows, packed or not."""

from __future__ import annotations

import difflib
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stepladder.data.readers import JSON_FORM, READERS, Found, parquet
from stepladder.errors import DataError

COMPRESSED = (".gz", ".zst")


def read(path: Path) -> Iterator[Found]:
    """The rows of one local file, in their order.

    Raises:
        DataError: no such file, an unknown kind, a file that cannot be read to its end, or no row at all.
    """
    if not os.path.exists(path):
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        way_out = near_file(str(path), siblings) or "paths are relative to the folder you start from"
        raise DataError(f"there is no data file {path}", way_out=way_out)
    if path.is_dir():
        raise DataError(f"{path} is a folder, though it has a file's name", way_out="name the file in it")
    reader = READERS.get(kind(path))
    if reader is None or (reader is parquet and path.suffix.lower() in COMPRESSED):
        raise DataError(
            f"{path}: files of the kind '{path.suffix}' are not read",
            way_out=f"one of {', '.join(READERS)}; all but .parquet may end in .gz or .zst too",
        )
    where = ""
    try:
        if path.stat().st_size:
            with _open(path) as stream:
                for where, row in reader(stream, str(path)):
                    yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"the file cannot be read to its end: {error}",
            where=where or str(path),
            why="this is the last row before the fault" if where else "",
            way_out="it is damaged or cut short: copy, download or pack it again",
        ) from None
    if not where:
        raise DataError(f"{path} holds no rows", way_out=JSON_FORM)


def kind(path: Path) -> str:
    """The suffix that says how a file is read: `.jsonl` for `rows.jsonl.gz`."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _open(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow  # datasets needs it anyway, and it notices a stream that ends early

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def near_file(name: str, known: Iterable[str]) -> str:
    """As `suggest` for keys, but a suffix that is left out counts little against a file's name."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
