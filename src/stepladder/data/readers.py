"""Data files to rows, each with the place it came from (`file:line`): CSV, Parquet, Arrow, Python; and what a row is.

A fault of one row is handed on in that row's stead, so that the caller may stop or skip it; a
fault of the file itself (not of its kind, a quote that never closes) is raised. JSON is the subject of json_documents.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from stepladder.errors import DataError, first_line

Row = dict[str, Any]
Found = tuple[str, "Row | DataError"]  # where, and the row or what is wrong with it
ROW_FORM = '{"input": "…", "output": "…"}'
JSON_FORM = f"one JSON object a line (.jsonl) or a list of them (.json): {ROW_FORM}"
SAVE_AS_UTF8 = "save the file as UTF-8; what Windows calls ANSI or Unicode is not the same"
MAX_LITERAL = 1_000_000  # characters of a Python literal in a cell: to parse them takes a hundred times their size
# What NumPy prints between the items of an array, and pandas' to_csv therefore writes: no comma.
NUMPY_REPR = re.compile(r"\}\s+\{|\barray\(|\bdtype=")


def parse_nested(text: Any, what: str) -> Any:
    """The value that a text holds: JSON, or a list or dictionary as Python prints it (a CSV cell of pandas).

    What is no text is returned as it is.

    Args:
        what: what the text is, as an error calls it: "the conversation".

    Raises:
        DataError: neither of the two, or an array as NumPy prints it, in which the commas are missing.
    """
    if not isinstance(text, str):
        return text
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        fault = error
    if text.lstrip()[:1] in ("[", "{") and len(text) <= MAX_LITERAL:
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return _literal(text.strip())
        if NUMPY_REPR.search(text):
            raise DataError(
                f"{what} is an array as NumPy and pandas print it, without commas: {quote(text)}",
                help="write the table as df.to_json(FILE, orient='records', lines=True, force_ascii=False)",
            )
    twice = f": {fault}" if "stands there twice" in str(fault) else ""
    raise DataError(f"{what} is not JSON{twice}: {quote(text)}", help='a list or object: "[…]"')


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape such as "\d" is no fault of the data
        tree = ast.parse(text, mode="eval")
    if has_key_twice(tree):
        raise ValueError("a key stands there twice")
    return ast.literal_eval(tree)


def has_key_twice(tree: ast.AST) -> bool:
    keys = (
        [key.value for key in node.keys if isinstance(key, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
    )
    return any(len(set(names)) != len(names) for names in keys)


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


def quote(value: Any, width: int = 60) -> str:
    """A value as a message quotes it: no longer than `width`, a text with its closing quotation mark."""
    if isinstance(value, str) and len(value) > width:
        return repr(value[: width - 3] + "…")
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


def bad_row(where: str, what: str, help: str) -> tuple[str, DataError]:
    return where, DataError(what, where=where, help=help)


def refuse_utf16(stream: Any, name: str) -> None:
    """UTF-16 and UTF-32 by their mark, or by the zero byte that each holds beside a file's first ASCII character."""
    head = stream.peek(2)[:2]
    if head in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise DataError(f"{name} is UTF-16 or UTF-32", why="data files are UTF-8", help=SAVE_AS_UTF8)


def csv_rows(stream: Any, name: str) -> Iterator[Found]:
    """CSV: comma, semicolon or tab, whichever the header has most of. Every cell is text.

    Separators at the end of the header make columns without a name, whose cells must be empty.
    """
    refuse_utf16(stream, name)
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB a cell is less than a long document
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    delimiter = max(",;\t", key=first.count)
    if first.lower().startswith("sep="):  # Excel's line about the separator: an empty one, so that line numbers hold
        first, delimiter = "\n", first[4:5]
    reader = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    header: list[str] = []
    width = 0  # cells of the header's line, those without a name at its end included
    while True:
        start = reader.line_num + 1
        where = f"{name}:{start}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" (lines {start} to {reader.line_num})" if reader.line_num > start else ""
            _, fault = bad_row(
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
            yield bad_row(where, "not UTF-8", SAVE_AS_UTF8)
        elif not header:
            width, header = len(cells), cells[: max((at for at, cell in enumerate(cells, start=1) if cell), default=0)]
            if not header:
                raise DataError("the header's cells are empty", where=where, help="name the columns in the first line")
            _refuse_duplicates(header, where)
        elif len(cells) == width and any(cells[len(header) :]):
            what = f"{quote(next(filter(None, cells[len(header) :])))} stands under an empty header"
            yield bad_row(where, what, "name the column, or put a text that holds the separator in double quotes")
        elif len(cells) not in (width, len(header)):
            what = f"{len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(header)}"
            yield bad_row(where, what, "put a text that holds the separator in double quotes")
        else:
            yield where, dict(zip(header, cells, strict=False))


def parquet_rows(stream: Any, name: str) -> Iterator[Found]:
    from pyarrow.parquet import ParquetFile

    with _arrow_faults(name, "Parquet"):
        # Else all of a row group is held, which may be the file.
        file = ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        _refuse_duplicates(file.schema_arrow.names, name)
        yield from _batch_rows(file.iter_batches(batch_size=1000), name)


def arrow_rows(stream: Any, name: str) -> Iterator[Found]:
    """An Arrow file (Feather version 2 is one too) or stream (what `datasets` writes)."""
    import pyarrow.ipc

    with _arrow_faults(name, "Arrow"):
        if stream.peek(6)[:6] == b"ARROW1":
            file = pyarrow.ipc.open_file(stream)
            schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(stream)
            schema, batches = reader.schema, iter(reader)
        _refuse_duplicates(schema.names, name)
        yield from _batch_rows(map(_validate, batches), name)


def _validate(batch: Any) -> Any:
    """The batch, once it is sure that a damaged file's offsets do not point out of its memory."""
    batch.validate(full=True)
    return batch


def _batch_rows(batches: Iterable[Any], name: str) -> Iterator[Found]:
    number = 0
    for batch in batches:
        for start in range(0, len(batch), 1000):
            for row in batch.slice(start, 1000).to_pylist():
                number += 1
                yield f"{name}: row {number}", without_nulls(row)


@contextlib.contextmanager
def _arrow_faults(name: str, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError, MemoryError) as error:
        reason = first_line(error)
        raise DataError(f"cannot be read as {kind}: {reason}", where=name, help="write the file again") from None


def python_rows(stream: Any, name: str) -> Iterator[Found]:
    """The one list of dictionaries that a Python file assigns to a name; its code is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape such as "\d" is no fault of the data
            tree = ast.parse(stream.read())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"{name}:{getattr(error, 'lineno', None) or 1}"
        reason = getattr(error, "msg", "") or error
        raise DataError(f"not valid Python: {reason}", where=where, help=f"data = [{ROW_FORM}, …]") from None
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
            help=f"one list at the top of the file: data = [{ROW_FORM}, …]",
        )
    for item in lists[0].elts:
        where = f"{name}:{item.lineno}"
        try:
            row = ast.literal_eval(item)
        except (ValueError, TypeError, RecursionError, MemoryError):
            yield bad_row(where, "not a literal, and the file is read, not run", "write the value out")
            continue
        if type(row) is not dict or not all(isinstance(key, str) for key in row):
            yield bad_row(where, f"not a row but {quote(row)}", ROW_FORM)
        elif has_key_twice(item):
            yield bad_row(where, "a key stands there twice", "remove one of them")
        else:
            yield where, row


def _refuse_duplicates(columns: list[str], where: str) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise DataError(f"two columns are named {twice[0]!r}", where=where, help="rename one of them")
