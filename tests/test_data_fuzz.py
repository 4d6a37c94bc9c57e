"""Whatever a file or a row holds, the answer is examples or a DataError, never another exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_read import CONTENTS

from stepladder.data.columns import find_shape
from stepladder.data.conversation import ROLES
from stepladder.data.formats import COLUMNS, MEDIA_COLUMNS, Example, to_example
from stepladder.data.rows import collect
from stepladder.data.source import Source
from stepladder.errors import DataError

FRAGMENTS = [
    *(
        '{"input": "a", "output": "b"}',
        '{"text": "\\ud800"}',
        '{"messages": [',
        '{"train": [',
        '{"data": [{"text": "a"}',
        '{"text": {"0": "a"',
        '{\n "text": "a"\n}\n',
        "input,output,,\n",
        "]}",
        "input,output",
        "text",
        "a,b",
        "a",
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        ",",
        ";",
        ":",
        "\\",
        "\n",
        "\r",
        "\r\n",
        "\t",
        " ",
        "\0",
        "null",
        "NaN",
        "1e999",
        "-",
    ),
    *("[" * 2000, "9" * 5000, "\u2028", "é", "🎉", "data = [", "#", "(", "{'text': 'a'}", "x\n" * 50),
]
PIECES = st.one_of(
    st.sampled_from([fragment.encode() for fragment in FRAGMENTS]),
    st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1f\x8b\x08"]),
    st.binary(max_size=8),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A good file cut, or with a few of its bytes replaced or others put in between."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.sampled_from([begin, begin + 1, begin + 7, len(content)]))
        content = content[:begin] + draw(PIECES) + content[end:]
    return content


def fresh(file: Path, content: bytes) -> Path:
    """Write a new file. To overwrite one costs some file systems a flush to the disk, a thousand times over."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return file


def read_both_ways(file: Path) -> None:
    """Read a file stopping at bad rows and skipping them; both must end in rows or a DataError."""
    for skip in (False, True):
        try:
            rows = collect(Source(str(file)), skip)
        except DataError as error:
            assert file.name in str(error) and error.what
        else:
            assert rows.fingerprint()["rows"] == len(rows) == len(rows.where) > 0
            for example in rows.examples:
                assert_sound(example)


def assert_sound(example: Example) -> None:
    """What render may rely on: texts that a tokenizer takes, known roles, an answer at the end."""
    json.dumps(example, sort_keys=True, ensure_ascii=False).encode()
    if "text" in example:
        assert example["text"].strip()
        return
    for message in example["messages"]:
        assert message["role"] in ROLES.values() and isinstance(message["content"], str)
    last = example["messages"][-1]
    assert last["role"] == "assistant" and (last["content"].strip() or last["tool_calls"])


SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".py", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12))
def test_arbitrary_bytes(suffix: str, pieces: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against a file whose bytes end in a traceback, a hang, or a text that no tokenizer takes."""
    read_both_ways(fresh(tmp_path_factory.getbasetemp() / f"fuzz{suffix}", b"".join(pieces)))


@pytest.mark.parametrize("name", [name for name in CONTENTS if not name.endswith("UPPER.JSONL")])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against damage in the middle of a good file: a packed one too, whose fault shows late."""
    content = data.draw(damaged(CONTENTS[name]))
    read_both_ways(fresh(tmp_path_factory.getbasetemp() / f"damaged_{name}", content))


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.one_of(st.just(b'{"text": "good"}'), PIECES), min_size=1, max_size=30))
def test_every_line_is_a_row_or_named(lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against rows that are dropped without a word: a line is blank, an example, or listed as skipped."""
    lines = [line.replace(b"\n", b" ") for line in lines]
    content = b'{"text": "good"}\n' + b"\n".join(lines)
    file = fresh(tmp_path_factory.getbasetemp() / "lines.jsonl", content)
    rows = collect(Source(str(file)), skip_bad_rows=True)
    filled = [number for number, line in enumerate(lines, start=2) if line.strip()]
    named = [int(place.removeprefix(f"{file}:").split(":")[0]) for place in (*rows.where, *rows.skipped)]
    assert sorted(named) == [1, *filled]


NAMES = st.sampled_from([*sorted(COLUMNS | MEDIA_COLUMNS), "role", "from", "content", "value", "tool_calls", "type"])
TEXTS = st.one_of(
    st.text(max_size=5), st.sampled_from([*ROLES, "text", "image", "\ud83d", "[]", "{}", '[{"a": 1}]', " "])
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(NAMES, TEXTS), inner, max_size=4)),
    max_leaves=12,
)
CALLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXTS, "arguments": VALUES})})
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(list(ROLES)), "content": st.one_of(TEXTS, VALUES)}),
        st.fixed_dictionaries({"from": TEXTS, "value": st.one_of(TEXTS, VALUES)}),
        st.fixed_dictionaries({"role": TEXTS, "content": VALUES, "tool_calls": st.lists(st.one_of(CALLS, VALUES))}),
        VALUES,
    ),
    max_size=4,
)
ROWS = st.dictionaries(st.one_of(NAMES, TEXTS), st.one_of(TEXTS, MESSAGES, VALUES), max_size=5)


@settings(max_examples=1500, deadline=None)
@given(row=ROWS)
def test_arbitrary_rows(row: dict[str, Any]) -> None:
    """Guards against a row whose types nobody thought of."""
    try:
        assert_sound(to_example(row, "rows.jsonl:1", find_shape(row, "rows.jsonl:1")))
    except DataError as error:
        assert "rows.jsonl:1" in str(error)
