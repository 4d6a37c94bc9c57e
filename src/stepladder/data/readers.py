"""One function for each kind of file: bytes to rows, each with the place it came from (`file:line`).

A fault of one row is handed on in that row's stead, so that the caller may stop or skip it; a
fault of the file itself (not of its kind, a quote that never closes) is raised.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stepladder.console import quoted
from stepladder.errors import DataError

Row = dict[str, Any]
Found = tuple[str, "Row | DataError"]  # where, and the row or what is wrong with it

ROW_FORM = '{"input": "…", "output": "…"}'
JSON_FORM = f"one JSON object a line (.jsonl) or a list of them (.json): {ROW_FORM}"
SAVE_AS_UTF8 = "save the file as UTF-8; what Windows calls ANSI or Unicode is not the same"
JSON_SPACE = re.compile(r"[ \t\r\n]*")
BOM = codecs.BOM_UTF8
PIECE = 2**20  # bytes of a JSON document that are read at once
# What a split's files are called in a folder, as the hub's own loader has it.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}
ROWS_KEYS = ("data", "rows", "examples", "samples", "items", "records", "instances", "dataset")
TURN_KEYS = frozenset({"role", "from", "type", "function", "speaker", "author", "sender", "user", "assistant"})
MAX_LITERAL = 1_000_000  # characters of a Python literal in a cell: to parse them takes a hundred times their size
# What NumPy prints between the items of an array, and pandas' to_csv therefore writes: no comma.
NUMPY_REPR = re.compile(r"\}\s+\{|\barray\(|\bdtype=")


def json_rows(stream: Any, name: str, split: str = "train") -> Iterator[Found]:
    """JSONL, or one JSON document: the content decides, whatever the file's suffix.

    JSONL is read line by line, and a bad line is handed on in its row's stead. A document is a list of
    objects, objects printed over several lines, or one object that holds the rows (`_of_object`).

    Args:
        split: which list is read where the document is an object of splits.

    Raises:
        DataError: another encoding than UTF-8, a document that is not valid JSON, or one whose rows cannot be told.
    """
    _refuse_utf16(stream, name)
    number, first = 1, stream.readline(PIECE).removeprefix(BOM)
    while first.isspace():
        number, first = number + first.endswith(b"\n"), stream.readline(PIECE)
    is_list = first.lstrip().startswith(b"[")
    if not is_list and not first.endswith(b"\n"):  # a list may stand in one line: no more of it than a piece is read
        first += stream.readline()
    ahead, following = [first], b""
    while first.endswith(b"\n") and not following.strip():
        ahead.append(following := stream.readline())
        if not following:
            break
    value, goes_on = _first_value(first)
    if is_list and not (value and following):
        yield from _list_items(_Text(b"".join(ahead), stream, name, number))
    elif goes_on and type(_first_value(following)[0]) is not dict:
        yield from _objects(_Text(b"".join(ahead), stream, name, number), split)
    elif type(value) is dict and not following:
        yield from _of_object(value, f"{name}:{number}", name, split)
    else:
        yield from _lines(itertools.chain(ahead, stream), name, number)


def _first_value(line: bytes) -> tuple[Any, bool]:
    """The JSON value of a line, or None; and whether it is an object that goes on in the next lines."""
    try:
        text = line.decode().rstrip()
        return DECODER.decode(text), False
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text) - 1 and not error.msg.startswith("Unterminated")
        return None, is_cut and text.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return None, False


def _lines(lines: Iterable[bytes], name: str, start: int) -> Iterator[Found]:
    for number, line in enumerate(lines, start):
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


class _Text:
    """The text of a JSON document, of which no more is held than the value at hand needs."""

    def __init__(self, head: bytes, stream: Any, name: str, line: int):
        """`head` are the bytes already read, and `line` is the number of their first line."""
        self.stream, self.name, self.line = stream, name, line
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.counted = "", 0, 0  # `line` is the line of the character at `counted`
        self.column = 0  # characters of the first line of `text` that are no longer held
        self.text = self._decode(head)

    def next_character(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            self.at = JSON_SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._read_more():
                return self.text[self.at : self.at + 1]

    def where(self) -> str:
        """`file:line` of the next character."""
        self.line, self.counted = self.line + self.text.count("\n", self.counted, self.at), self.at
        return f"{self.name}:{self.line}"

    def value(self) -> Any:
        """The JSON value that begins here; what follows it comes next.

        Raises:
            DataError: not valid JSON.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - len("-Infinity")
                if not is_cut or not self._read_more():
                    raise self.fault(error, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.fault(error, self.at) from None
            else:
                # A number may go on in the next piece, with up to three characters that are one only together: e+5.
                if len(self.text) - end >= len("e+5") or not self._read_more():
                    self.at = end
                    return value

    def fault(self, error: Exception, position: int) -> DataError:
        """An error in the JSON, with the line and column of a position in `text`."""
        line = self.line + self.text.count("\n", self.counted, position)
        begin = self.text.rfind("\n", 0, position)
        column = position - begin if begin >= 0 else self.column + position + 1
        return _invalid_json(error, f"{self.name}:{line}:{column}")

    def _read_more(self) -> bool:
        """Drop what is read and read at least as much again as is left; False at the end of the file."""
        content = self.stream.read(max(PIECE, len(self.text) - self.at))
        if not content:
            self._decode(b"", final=True)
            return False
        self.where()
        begin = self.text.rfind("\n", 0, self.at)
        self.column = self.at - begin - 1 if begin >= 0 else self.column + self.at
        self.text, self.at, self.counted = self.text[self.at :], 0, 0
        self.text += self._decode(content)
        return True

    def _decode(self, content: bytes, final: bool = False) -> str:
        try:
            return self.decoder.decode(content, final)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.counted) + error.object.count(b"\n", 0, error.start)
            raise DataError("not UTF-8", where=f"{self.name}:{line}", way_out=SAVE_AS_UTF8) from None


def _list_items(text: _Text) -> Iterator[Found]:
    """Item by item, so that each row knows its line."""
    text.next_character()
    text.at += 1
    number = 0
    more = text.next_character() != "]"
    while more:
        number += 1
        where = f"{text.where()} (row {number})"
        row = text.value()
        yield (where, row) if type(row) is dict else _bad(where, f"not a JSON object but {shown(row)}", JSON_FORM)
        more = text.next_character() == ","
        if more:
            text.at += 1
            text.next_character()
        elif text.next_character() != "]":
            raise text.fault(ValueError("Expecting ',' delimiter"), text.at)
    text.at += 1
    if text.next_character():
        raise text.fault(ValueError("Extra data"), text.at)


def _objects(text: _Text, split: str) -> Iterator[Found]:
    """Objects one after another, each over several lines; a single one may hold the rows."""
    number = 0
    while text.next_character():
        number += 1
        where, row = text.where(), text.value()
        if type(row) is not dict:
            yield _bad(where, f"not a JSON object but {shown(row)}", JSON_FORM)
        elif number == 1 and not text.next_character():
            yield from _of_object(row, where, text.name, split)
        else:
            yield f"{where} (row {number})", row


def _of_object(value: Row, where: str, name: str, split: str) -> Iterator[Found]:
    """The rows of a file that is one object: by split, under one key, by columns, or the object as the one row.

    Raises:
        DataError: no such split; columns of unequal lengths; other keys beside the one that holds the rows.
    """
    if is_split_object(value):
        key = split_key(value, split)
        if key is None:
            held = ", ".join(map(repr, value))
            raise DataError(f"the file holds the splits {held}", where=name, why=f"'{split}' is asked for")
        yield from _number_rows(value[key], name, f" of '{key}'")
    elif key := _rows_key(value):
        if others := [other for other in value if other != key]:
            raise DataError(
                f"'{key}' holds the rows, and {', '.join(map(shown, others))} beside it would not be read",
                where=where,
                way_out=f"{_extraction(name, key)}\nif the object is one row: put it in brackets, [{{…}}]",
            )
        yield from _number_rows(value[key], name, f" of '{key}'")
    elif {"columns", "data"} <= value.keys():
        raise DataError(
            "a table as pandas' to_json(orient='split') writes it",
            where=where,
            way_out="write it as to_json(FILE, orient='records', lines=True, force_ascii=False)",
        )
    elif columns := _columns(value):
        lengths = {column: len(cells) for column, cells in columns.items()}
        if len(set(lengths.values())) > 1:
            numbers = ", ".join(f"{shown(column)} {length}" for column, length in lengths.items())
            raise DataError(
                f"lists of unequal lengths, so they are not columns of one table: {numbers}",
                where=where,
                way_out=JSON_FORM,
            )
        rows = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
        yield from _number_rows(rows, name)
    elif all(key.isdecimal() and type(row) is dict for key, row in value.items()):  # pandas' to_json(orient="index")
        yield from _number_rows(value.values(), name)
    else:
        yield where, value


def _number_rows(rows: Iterable[Any], name: str, of: str = "") -> Iterator[Found]:
    for number, row in enumerate(rows, start=1):
        where = f"{name}: row {number}{of}"
        yield (where, row) if type(row) is dict else _bad(where, f"not a JSON object but {shown(row)}", JSON_FORM)


def is_split_object(value: Row) -> bool:
    """Whether an object holds nothing but lists under the names of splits: `{"train": […], "test": […]}`."""
    return bool(value) and all(split_word(key) and type(rows) is list for key, rows in value.items())


def split_key(splits: Iterable[str], split: str) -> str | None:
    """The key of a split: its own name, or the only one that speaks of it (`test_sft` for `test`)."""
    near = [key for key in splits if key == split] or [key for key in splits if split_word(key) == split]
    return near[0] if len(near) == 1 else None


def _rows_key(value: Row) -> str | None:
    """The key that holds the file's rows: one with a usual name, or the only one, unless it holds one row's turns."""

    def holds_objects(key: str) -> bool:
        return type(value.get(key)) is list and all(type(item) is dict for item in value[key])

    if key := next((key for key in ROWS_KEYS if holds_objects(key)), None):
        return key
    key = next(iter(value)) if len(value) == 1 else ""
    return key if key and holds_objects(key) and not _holds_turns(value[key]) else None


def _columns(value: Row) -> dict[str, list[Any]] | None:
    """The columns of an object of lists, or of one of dictionaries by row number (pandas' `to_json()`)."""
    held = list(value.values())
    if held and all(type(cells) is list for cells in held):
        return None if any(map(_holds_turns, held)) else value
    if held and all(type(cells) is dict and list(cells) == list(held[0]) for cells in held):
        by_number = held[0] and all(key.isdecimal() for key in held[0])
        return {column: list(cells.values()) for column, cells in value.items()} if by_number else None
    return None


def _holds_turns(items: list[Any]) -> bool:
    """Whether a list is of one row: its turns, content parts or tools."""
    return any(type(item) is dict and not TURN_KEYS.isdisjoint(item) for item in items)


def _extraction(name: str, key: str) -> str:
    code = f"import json; [print(json.dumps(row)) for row in json.load(open({json.dumps(name)}))[{json.dumps(key)}]]"
    return f"python -c {quoted(code)} > {quoted(name + '.jsonl')}"


def split_word(name: str) -> str | None:
    """The split that a name speaks of (`test_sft`, `data/train-00000-of-00002.parquet`), or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words for split, names in SPLIT_WORDS.items() if word in names), None)


def separated(stream: Any, name: str) -> Iterator[Found]:
    """CSV: comma, semicolon or tab, whichever the header has most of. Every cell is text.

    Separators at the end of the header make columns without a name, whose cells must be empty.
    """
    _refuse_utf16(stream, name)
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
            width, header = len(cells), _without_empty_end(cells)
            if not header:
                raise DataError(
                    "the header's cells are empty", where=where, way_out="name the columns in the first line"
                )
            _refuse_duplicates(header, where)
        elif len(cells) == width and any(cells[len(header) :]):
            what = f"{shown(next(filter(None, cells[len(header) :])))} stands under an empty header"
            yield _bad(where, what, "name the column, or put a text that holds the separator in double quotes")
        elif len(cells) not in (width, len(header)):
            what = f"{len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(header)}"
            yield _bad(where, what, "put a text that holds the separator in double quotes")
        else:
            yield where, dict(zip(header, cells, strict=False))


def parquet(stream: Any, name: str) -> Iterator[Found]:
    from pyarrow.parquet import ParquetFile

    with _arrow_faults(name, "Parquet"):
        file = ParquetFile(stream)
        _refuse_duplicates(file.schema_arrow.names, name)
        yield from _batch_rows(file.iter_batches(batch_size=1000), name)


def arrow(stream: Any, name: str) -> Iterator[Found]:
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be read as {kind}: {reason}", where=name, way_out="write the file again") from None


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
        elif _has_key_twice(item):
            yield _bad(where, "a key stands there twice", "remove one of them")
        else:
            yield where, row


def parse_nested(text: str, what: str) -> Any:
    """The value that a text holds: JSON, or a list or dictionary as Python prints it (a CSV cell of pandas).

    Args:
        what: what the text is, as an error calls it: "the conversation".

    Raises:
        DataError: neither of the two, or an array as NumPy prints it, in which the commas are missing.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        fault = error
    if text.lstrip()[:1] in ("[", "{") and len(text) <= MAX_LITERAL:
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return _literal(text.strip())
        if NUMPY_REPR.search(text):
            raise DataError(
                f"{what} is an array as NumPy and pandas print it, without commas: {shown(text)}",
                way_out="write the table as df.to_json(FILE, orient='records', lines=True, force_ascii=False)",
            )
    twice = f": {fault}" if "stands there twice" in str(fault) else ""
    raise DataError(f"{what} is not JSON{twice}: {shown(text)}", way_out='a list or object: "[…]"')


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape such as "\d" is no fault of the data
        tree = ast.parse(text, mode="eval")
    if _has_key_twice(tree):
        raise ValueError("a key stands there twice")
    return ast.literal_eval(tree)


def _has_key_twice(tree: ast.AST) -> bool:
    keys = (
        [key.value for key in node.keys if isinstance(key, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
    )
    return any(len(set(names)) != len(names) for names in keys)


READERS: dict[str, Callable[[Any, str], Iterator[Found]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".ndjson": json_rows,
    ".jsonlines": json_rows,
    ".csv": separated,
    ".tsv": separated,
    ".parquet": parquet,
    ".arrow": arrow,
    ".feather": arrow,
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
    in_text = reason.startswith("Invalid control character")
    way_out = "in a text, a line break is written \\n and a tab \\t" if in_text else JSON_FORM
    return DataError(f"invalid JSON: {reason}", where=where, way_out=way_out)


def _without_empty_end(cells: list[str]) -> list[str]:
    """Cells without the empty ones at their end."""
    last = max((number for number, cell in enumerate(cells, start=1) if cell), default=0)
    return cells[:last]


def _refuse_utf16(stream: Any, name: str) -> None:
    """UTF-16 and UTF-32 by their mark, or by the zero byte that each holds beside a file's first ASCII character."""
    head = stream.peek(2)[:2]
    if head in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise DataError(f"{name} is UTF-16 or UTF-32", why="data files are UTF-8", way_out=SAVE_AS_UTF8)


def _refuse_duplicates(columns: list[str], where: str) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise DataError(f"two columns are named {twice[0]!r}", where=where, way_out="rename one of them")
