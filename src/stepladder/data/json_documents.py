"""JSON to rows: lines, a list, objects one after another, or one object that holds the rows."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from stepladder.console import quote_for_shell
from stepladder.data.readers import DECODER, JSON_FORM, SAVE_AS_UTF8, Found, Row, bad_row, quote, refuse_utf16
from stepladder.errors import DataError

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


def json_rows(stream: Any, name: str, split: str = "train") -> Iterator[Found]:
    """JSONL, or one JSON document: the content decides, whatever the file's suffix.

    JSONL is read line by line, and a bad line is handed on in its row's stead. A document is a list of
    objects, objects printed over several lines, or one object that holds the rows (`_of_object`).

    Args:
        split: which list is read where the document is an object of splits.

    Raises:
        DataError: another encoding than UTF-8, a document that is not valid JSON, or one whose rows cannot be told.
    """
    refuse_utf16(stream, name)
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
            yield bad_row(where, f"not UTF-8 at byte {error.start + 1}", SAVE_AS_UTF8)
        except (ValueError, RecursionError) as error:
            yield where, _invalid_json(error, f"{where}:{getattr(error, 'colno', 1)}")
        else:
            yield _as_row(where, row)


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
            raise DataError("not UTF-8", where=f"{self.name}:{line}", help=SAVE_AS_UTF8) from None


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
        yield _as_row(where, row)
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
            yield _as_row(where, row)
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
            code = f"json.load(open({json.dumps(name)}))[{json.dumps(key)}]"
            code = f"import json; [print(json.dumps(row)) for row in {code}]"
            extraction = f"python -c {quote_for_shell(code)} > {quote_for_shell(name + '.jsonl')}"
            raise DataError(
                f"'{key}' holds the rows, and {', '.join(map(quote, others))} beside it would not be read",
                where=where,
                help=f"{extraction}\nif the object is one row: put it in brackets, [{{…}}]",
            )
        yield from _number_rows(value[key], name, f" of '{key}'")
    elif {"columns", "data"} <= value.keys():
        raise DataError(
            "a table as pandas' to_json(orient='split') writes it",
            where=where,
            help="write it as to_json(FILE, orient='records', lines=True, force_ascii=False)",
        )
    elif columns := _columns(value):
        lengths = {column: len(cells) for column, cells in columns.items()}
        if len(set(lengths.values())) > 1:
            numbers = ", ".join(f"{quote(column)} {length}" for column, length in lengths.items())
            raise DataError(
                f"lists of unequal lengths, so they are not columns of one table: {numbers}",
                where=where,
                help=JSON_FORM,
            )
        rows = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
        yield from _number_rows(rows, name)
    elif all(key.isdecimal() and type(row) is dict for key, row in value.items()):  # pandas' to_json(orient="index")
        yield from _number_rows(value.values(), name)
    else:
        yield where, value


def _number_rows(rows: Iterable[Any], name: str, of: str = "") -> Iterator[Found]:
    for number, row in enumerate(rows, start=1):
        yield _as_row(f"{name}: row {number}{of}", row)


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


def split_word(name: str) -> str | None:
    """The split that a name speaks of (`test_sft`, `data/train-00000-of-00002.parquet`), or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words for split, names in SPLIT_WORDS.items() if word in names), None)


def _as_row(where: str, value: Any) -> Found:
    return (where, value) if type(value) is dict else bad_row(where, f"not a JSON object but {quote(value)}", JSON_FORM)


def _invalid_json(error: Exception, where: str) -> DataError:
    reason = getattr(error, "msg", "") or (str(error) if isinstance(error, ValueError) else "nested too deeply")
    in_text = reason.startswith("Invalid control character")
    help = "in a text, a line break is written \\n and a tab \\t" if in_text else JSON_FORM
    return DataError(f"invalid JSON: {reason}", where=where, help=help)
