"""One function for each kind of file: bytes to rows, each with the place it came from (`file:line`).

A fault of one row is handed on in that row's stead, so that the caller may stop or skip it; a
fault of the file itself (not of its kind, a quote that never closes) is raised.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from stepladder.errors import DataError

Row = dict[str, Any]
Found = tuple[str, "Row | DataError"]  # where, and the row or what is wrong with it

ROW_FORM = '{"input": "…", "output": "…"}'
JSON_FORM = f"one JSON object a line (.jsonl) or a list of them (.json): {ROW_FORM}"
SAVE_AS_UTF8 = "save the file as UTF-8; what Windows calls ANSI or Unicode is not the same"
JSON_SPACE = re.compile(r"[ \t\r\n]*")


def jsonl(stream: Any, name: str) -> Iterator[Found]:
    _refuse_utf16(stream, name)
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.isspace() or not line:
            continue
        where = f"{name}:{number}"
        try:
            row = DECODER.decode(line.rstrip(b"\r\n").decode())
        except UnicodeDecodeError as error:
            yield _bad(where, f"not UTF-8 at byte {error.start + 1}", SAVE_AS_UTF8)
        except (ValueError, RecursionError) as error:
            yield where, _invalid_json(error, f"{where}:{getattr(error, 'colno', 1)}")
        else:
            yield (where, row) if type(row) is dict else _bad(where, f"not a JSON object but {shown(row)}", JSON_FORM)


def json_list(stream: Any, name: str) -> Iterator[Found]:
    """A list of objects. An object a line is read too: many a `.json` file is JSONL by another name."""
    _refuse_utf16(stream, name)
    content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError("not UTF-8", where=f"{name}:{line}", way_out=SAVE_AS_UTF8) from None
    if text.lstrip().startswith("["):
        yield from _list_items(text, name)
    else:
        yield from jsonl(io.BufferedReader(io.BytesIO(content)), name)


def _list_items(text: str, name: str) -> Iterator[Found]:
    """Item by item, so that each row knows its line."""

    def skip_space(position: int) -> int:
        return JSON_SPACE.match(text, position).end()  # type: ignore[union-attr]

    at = skip_space(text.index("[") + 1)
    line, counted, number = 1, 0, 0
    more = text[at : at + 1] != "]"
    try:
        while more:
            row, end = DECODER.raw_decode(text, at)
            line, counted, number = line + text.count("\n", counted, at), at, number + 1
            where = f"{name}:{line} (row {number})"
            yield (where, row) if type(row) is dict else _bad(where, f"not a JSON object but {shown(row)}", JSON_FORM)
            at = skip_space(end)
            more = text[at : at + 1] == ","
            if more:
                at = skip_space(at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise _invalid_json(error, f"{name}:{line}:{getattr(error, 'colno', 1)}") from None


def separated(stream: Any, name: str) -> Iterator[Found]:
    """CSV: comma, semicolon or tab, whichever the header has most of. Every cell is text."""
    _refuse_utf16(stream, name)
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB a cell is less than a long document
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    reader = csv.reader(itertools.chain([first], text), delimiter=max(",;\t", key=first.count), strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1
        where = f"{name}:{start}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" (lines {start} to {reader.line_num})" if reader.line_num > start else ""
            _, fault = _bad(
                where,
                f"invalid CSV: {error}{lines}",
                'a text that holds a comma, a quote or a line break stands in quotes: "say ""yes"""',
            )
            if not header or "end of data" in str(error):  # a quote left open swallows all that follows
                raise fault from None
            yield where, fault
            continue
        if not cells:  # a blank line
            continue
        if not is_unicode("".join(cells)):
            yield _bad(where, "not UTF-8", SAVE_AS_UTF8)
        elif not header:
            header = cells
            _refuse_duplicates(header, where)
        elif len(cells) != len(header):
            what = f"{len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(header)}"
            yield _bad(where, what, "put a text that holds the separator in double quotes")
        else:
            yield where, dict(zip(header, cells, strict=True))


def parquet(stream: Any, name: str) -> Iterator[Found]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        file = ParquetFile(stream)
        _refuse_duplicates(file.schema_arrow.names, name)
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}: row {number}", without_nulls(row)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be read as Parquet: {reason}", where=name, way_out="write the file again") from None


def python_list(stream: Any, name: str) -> Iterator[Found]:
    """The one list of dictionaries that a Python file assigns to a name; its code is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape such as "\d" is no fault of the data
            tree = ast.parse(stream.read())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"{name}:{getattr(error, 'lineno', None) or 1}"
        reason = getattr(error, "msg", "") or error
        raise DataError(f"not valid Python: {reason}", where=where, way_out=f"data = [{ROW_FORM}, …]") from None
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.List)
        and any(isinstance(item, ast.Dict) for item in node.value.elts)
    ]
    if len(lists) != 1:
        places = f" (lines {', '.join(str(value.lineno) for value in lists)})" if lists else ""
        raise DataError(
            f"{len(lists) or 'no'} lists of rows{places} in a Python file, where one is read",
            where=name,
            way_out=f"one list at the top of the file: data = [{ROW_FORM}, …]",
        )
    for item in lists[0].elts:
        where = f"{name}:{item.lineno}"
        try:
            row = ast.literal_eval(item)
        except (ValueError, TypeError, RecursionError, MemoryError):
            yield _bad(where, "not a literal, and the file is read, not run", "write the value out")
            continue
        if type(row) is not dict or not all(isinstance(key, str) for key in row):
            yield _bad(where, f"not a row but {shown(row)}", ROW_FORM)
        elif len(row) != len(item.keys):  # type: ignore[attr-defined]
            yield _bad(where, "a key stands there twice", "remove one of them")
        else:
            yield where, row


READERS: dict[str, Callable[[Any, str], Iterator[Found]]] = {
    ".jsonl": jsonl,
    ".json": json_list,
    ".csv": separated,
    ".tsv": separated,
    ".parquet": parquet,
    ".py": python_list,
}


def without_nulls(row: Row) -> Row:
    """Undo what Arrow does to nested values: each has the keys of all there, the absent ones as null."""

    def clean(value: Any) -> Any:
        if type(value) is dict:
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if type(value) is list else value

    return {column: clean(value) if type(value) in (dict, list) else value for column, value in row.items()}


def is_unicode(text: str) -> bool:
    """False where a text holds a lone half of a surrogate pair: no file and no tokenizer takes that."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, width: int = 60) -> str:
    """A value as a message quotes it: no longer than `width`."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list a thousand deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else text[: width - 1] + "…"


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _bad(where: str, what: str, way_out: str) -> tuple[str, DataError]:
    return where, DataError(what, where=where, way_out=way_out)


def _invalid_json(error: Exception, where: str) -> DataError:
    reason = getattr(error, "msg", "") or (str(error) if isinstance(error, ValueError) else "nested too deeply")
    return DataError(f"invalid JSON: {reason}", where=where, way_out=JSON_FORM)


def _refuse_utf16(stream: Any, name: str) -> None:
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} is UTF-16", why="data files are UTF-8", way_out=SAVE_AS_UTF8)


def _refuse_duplicates(columns: list[str], where: str) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise DataError(f"two columns are named {twice[0]!r}", where=where, way_out="rename one of them")
