"""The rows and values of data files: what a row is, how a message quotes one, and lists that are written as text."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from typing import Any

from stepladder.errors import DataError

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
    """A value as a message quotes it: no longer than `width`."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list a thousand deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else text[: width - 1] + "…"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
