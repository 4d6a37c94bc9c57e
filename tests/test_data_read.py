"""Files to rows: every kind of file, packed or not, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from conftest import script
from stepladder.data import mixture
from stepladder.data.rows import LONG, collect
from stepladder.data.source import Source
from stepladder.errors import DataError

ROWS = [
    {"input": f"Question {n}, with a comma?", "output": f'Answer {n}: "café" 🎉\nin two lines.'} for n in range(1, 4)
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def arrow(rows: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    """An Arrow stream, or with `new_file` an Arrow file, of two batches."""
    out, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


CONTENTS = {
    "rows.jsonl": jsonl(ROWS),
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "one_line.json": json.dumps(ROWS).encode(),
    "lines.json": jsonl(ROWS),
    "rows.csv": separated(ROWS),
    "semicolons.csv": separated(ROWS, ";"),
    "rows.tsv": separated(ROWS, "\t"),
    "rows.parquet": parquet(ROWS),
    "rows.py": b'"""Mine."""\nraise SystemExit("run!")\nnames: list = ["a"]\nmy_data = ' + repr(ROWS).encode() + b"\n",
    "rows.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(separated(ROWS)),
    "rows.jsonl.zst": zstd(jsonl(ROWS)),
    "rows.csv.zst": zstd(separated(ROWS)),
    "members.jsonl.gz": gzip.compress(jsonl(ROWS[:1])) + gzip.compress(jsonl(ROWS[1:])),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "bom.csv": b"\xef\xbb\xbf" + separated(ROWS),
    "crlf.jsonl": jsonl(ROWS).replace(b"\n", b"\r\n"),
    "blank_lines.jsonl": jsonl(ROWS).replace(b"\n", b"\n\n  \n"),
    "no_last_break.jsonl": jsonl(ROWS).rstrip(),
    "UPPER.JSONL": jsonl(ROWS),
    "rows.ndjson": jsonl(ROWS),
    "rows.jsonlines.gz": gzip.compress(jsonl(ROWS)),
    "list.jsonl": json.dumps(ROWS).encode(),
    "pretty_list.jsonl": b"\n\n" + json.dumps(ROWS, indent=1).encode(),
    "rows.arrow": arrow(ROWS, pyarrow.ipc.new_stream),
    "file.arrow": arrow(ROWS, pyarrow.ipc.new_file),
    "rows.feather": arrow(ROWS, pyarrow.ipc.new_file),
    "separators.csv": separated(ROWS).replace(b"\r\n", b",,\r\n"),
    "separators_in_header.csv": separated(ROWS).replace(b"input,output\r\n", b"input,output,,\r\n"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    """Guards against a kind of file that loses, splits or alters a text on its way in."""
    (tmp_path / name).write_bytes(CONTENTS[name])
    rows = mixture.from_name(str(tmp_path / name))
    answers = [example["messages"] for example in rows.examples]
    assert [[turn["content"] for turn in turns] for turns in answers] == [[r["input"], r["output"]] for r in ROWS]
    assert all(where.startswith(str(tmp_path / name) + ":") for where in rows.where)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", b'\n{"input": "a", "output": "b"}\n\n{"input": "c", "output": "d"}', ["2", "4"]),
        ("a.json", b'[\n {"text":\n  "a"},\n\n {"text": "b"}]', ["2 (row 1)", "5 (row 2)"]),
        ("a.csv", b'input,output\n"a\nA",b\n\nc,d\n', ["2", "5"]),
        ("a.py", b'x = [\n  {"input": "a", "output": "b"},\n  {"input": "c",\n "output": "d"}]', ["2", "3"]),
    ],
)  # fmt: skip
def test_rows_know_their_line(name: str, content: bytes, lines: list[str], tmp_path: Path) -> None:
    """Guards against counting rows where an editor counts lines."""
    file = tmp_path / name
    file.write_bytes(content)
    assert mixture.from_name(str(file)).where == [f"{file}:{line}" for line in lines]


def test_numbers_in_csv_are_text(tmp_path: Path) -> None:
    """Guards against type guessing, by which an answer of 007 becomes 7."""
    file = tmp_path / "a.csv"
    file.write_text("id,question,answer\n1,Who is it?,007\n")
    assert mixture.from_name(str(file)).examples[0]["messages"][1]["content"] == "007"


def test_parquet_does_not_fill_messages_with_nulls(tmp_path: Path) -> None:
    """Guards against Arrow's union of keys: each call would have the arguments of all calls, most of them null."""
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}},
    ]
    turns = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "Sunny."},
    ]
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet([{"messages": turns}]))
    assert mixture.from_name(str(file)).examples == [{"messages": turns}]


def lines_70_001(bad: bytes) -> bytes:
    good = json.dumps(ROWS[0]).encode() + b"\n"
    return good * 70_000 + bad + b"\n" + good


BAD = {  # name: content, and what the message says beside the file's name
    "json.jsonl": (lines_70_001(b'{"input": "half", "output": "'), [":70001:29", "invalid JSON", "Unterminated"]),
    "twice.jsonl": (b'{"input": "a", "input": "b", "output": "c"}', [":1", "'input' stands there twice"]),
    "lists.jsonl": (b'["a", "b"]\n["c", "d"]\n', [":1", "not a JSON object but ['a', 'b']"]),
    "number.jsonl": (b'{"text": "a"}\n7', [":2", "not a JSON object but 7", "a list of them (.json)"]),
    "deep.jsonl": (b"[" * 200_000, [":1", "nested too deeply"]),
    "latin1.jsonl": (jsonl(ROWS) + '{"input": "café"}'.encode("latin-1"), [":4", "not UTF-8 at byte 15"]),
    "utf16.jsonl": (jsonl(ROWS).decode().encode("utf-16"), ["is UTF-16", "UTF-8"]),
    "utf16.csv": (separated(ROWS).decode().encode("utf-16"), ["is UTF-16"]),
    "empty.jsonl": (b"", ["holds no rows"]),
    "blank.jsonl": (b"\n \r\n", ["holds no rows"]),
    "bom_only.jsonl": (b"\xef\xbb\xbf", ["holds no rows"]),
    "empty.jsonl.gz": (gzip.compress(b""), ["holds no rows"]),
    "cut.jsonl.gz": (gzip.compress(jsonl(ROWS))[:-20], ["cannot be read to its end", "cut short"]),
    "cut.jsonl.zst": (zstd(lines_70_001(b""))[:-20], ["cannot be read to its end", "cut short"]),
    "false.jsonl.gz": (jsonl(ROWS), ["cannot be read to its end"]),
    "false.jsonl.zst": (jsonl(ROWS), ["cannot be read to its end"]),
    "cut.json": (json.dumps(ROWS, indent=1).encode()[:150], [":7:12", "invalid JSON"]),
    "comma.json": (b'[\n{"input": "a", "output": "b"},\n]', [":3:1", "invalid JSON"]),
    "missing_comma.json": (b'[{"text": "a"}\n {"text": "b"}]', [":2:2", "Expecting ',' delimiter"]),
    "rest.json": (b'[{"text": "a"}] x', [":1", "Extra data"]),
    "empty_list.json": (b"[ ]", ["holds no rows"]),
    "not_rows.json": (b'[{"text": "a"},\n "b"]', [":2 (row 2)", "not a JSON object"]),
    "ragged.csv": (b"input,output\na,b\nc,d, and more\n", [":3", "3 cells where the header has 2", "quotes"]),
    "short.csv": (b"input,output\na\n", [":2", "1 cell where the header has 2"]),
    "header.csv": (b"input,output,input\na,b,c\n", [":1", "two columns are named 'input'"]),
    "header_only.csv": (b"input,output\n", ["holds no rows"]),
    "open_quote.csv": (b'input,output\na,b\n"c,d\ne,f\n', [":3", "unexpected end of data"]),
    "stray_quote.csv": (b'input,output\n"a" b,c\n', [":2", "invalid CSV"]),
    "latin1.csv": ("input,output\nCafé?,Nein danke.\n".encode("latin-1"), [":2", "not UTF-8"]),
    "not.parquet": (b"PAR1 and nothing more", ["cannot be read as Parquet"]),
    "cut.parquet": (parquet(ROWS)[:-9], ["cannot be read as Parquet"]),
    "packed.parquet.gz": (gzip.compress(parquet(ROWS)), ["are not read", "all but .parquet"]),
    "table.xlsx": (b"PK", ["the kind '.xlsx'", "a spreadsheet", "table.xlsx.jsonl"]),
    "syntax.py": (b"a = [\n 1 +,\n]", [":2", "not valid Python"]),
    "none.py": (b"import this\nx = 1\n", ["no lists of rows"]),
    "two.py": (b"a = [{'text': 'a'}]\nb = [{'text': 'b'}]", ["2 lists of rows (lines 1, 2)"]),
    "code.py": (b"a = [{'text': 'a'},\n {'text': open('x').read()}]", [":2", "not a literal"]),
    "twice.py": (b"a = [{'text': 'a',\n 'text': 'b'}]", [":1", "twice"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_say_where_and_what(name: str, tmp_path: Path) -> None:
    """Guards against a traceback, a message without its place, and files that are read in part without a word."""
    content, parts = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        mixture.from_name(str(tmp_path / name))
    message = str(caught.value)
    for part in [name, "help:", *parts]:
        assert part in message, message


@pytest.mark.parametrize("name", ["json.jsonl", "latin1.csv", "cut.jsonl.gz", "ragged.csv"])
def test_bad_files_through_the_command_line(
    name: str, tiny: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    """Guards against a fault that the library reports and the script turns into a traceback."""
    content, parts = BAD[name]
    (tmp_path / name).write_bytes(content)
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(tmp_path / name))
    done = script("sft", "--recipe", recipe)
    assert done.code == 2 and "Traceback" not in done.err, done
    for part in [name, *parts]:
        assert part in done.err, done


def test_a_missing_file_names_the_near_one(tmp_path: Path) -> None:
    """Guards against a typing error that costs a search."""
    (tmp_path / "techco.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(DataError, match=r"no data file .*techko.jsonl(.|\n)*did you mean '.*techco.jsonl'"):
        mixture.from_name(str(tmp_path / "techko.jsonl"))


def test_a_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    """Guards against `IsADirectoryError`."""
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder, though it has a file's name"):
        mixture.from_name(str(tmp_path / "rows.jsonl"))


def test_a_row_of_ten_megabytes_is_taken_and_noted(tmp_path: Path) -> None:
    """Guards against a limit on a row's size, and against silence about a row that can hardly be meant."""
    for name, content in (("long.jsonl", jsonl), ("long.csv", separated)):
        (tmp_path / name).write_bytes(content([*ROWS, {"input": "Why?", "output": "x" * 10_000_000}]))
        rows = mixture.from_name(str(tmp_path / name))
        assert len(rows) == 4 and LONG < 10_000_000
        assert len(rows.notes) == 1 and rows.where[3] in rows.notes[0] and "10,000,004 characters" in rows.notes[0]


def folder_of(tmp_path: Path, names: list[str]) -> Path:
    for name in names:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = jsonl([{"input": "Which file is this?", "output": name}])
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / "set"


def files_read(source: Source) -> list[str]:
    return [example["messages"][1]["content"] for example in collect(source).examples]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    """Guards against the file system's order, which differs between machines and so would the curve."""
    folder = folder_of(tmp_path, ["b.jsonl", "a/z.jsonl.gz", "c.jsonl", "README.md", ".hidden.jsonl", "make.py"])
    assert files_read(Source(str(folder))) == ["a/z.jsonl.gz", "b.jsonl", "c.jsonl"]


def test_a_folder_keeps_its_splits_apart(tmp_path: Path) -> None:
    """Guards against training on the test file that lies beside the training file."""
    folder = folder_of(
        tmp_path, ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl", "dev.jsonl"]
    )
    assert files_read(Source(str(folder))) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert files_read(Source(str(folder), split="test")) == ["test.jsonl"]
    assert files_read(Source(str(folder), split="validation")) == ["dev.jsonl"]
    with pytest.raises(DataError, match=r"no split 'test_sft'(.|\n)*test, train, validation"):
        collect(Source(str(folder), split="test_sft"))


def test_a_folder_without_data_files_says_what_it_holds(tmp_path: Path) -> None:
    """Guards against an empty training set out of a wrong path."""
    folder = folder_of(tmp_path, ["README.md"])
    with pytest.raises(DataError, match=r"holds no data files(.|\n)*README.md(.|\n)*.jsonl"):
        mixture.from_name(str(folder))


def test_the_ways_in_which_trl_names_files(tmp_path: Path) -> None:
    """Guards against a recipe written for TRL that reads other files here, or none."""
    folder = folder_of(tmp_path, ["a.jsonl", "b.jsonl", "c/d.jsonl"])
    a, b = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    assert files_read(Source("json", data_files=a)) == ["a.jsonl"]
    assert files_read(Source("json", data_files=[b, a])) == ["b.jsonl", "a.jsonl"]
    assert files_read(Source("json", data_files=str(folder / "*.jsonl"))) == ["a.jsonl", "b.jsonl"]
    assert files_read(Source("json", data_files={"train": a, "test": [b]}, split="test")) == ["b.jsonl"]
    assert files_read(Source("json", data_dir=str(folder / "c"))) == ["c/d.jsonl"]
    assert files_read(Source(str(folder), data_dir="c")) == ["c/d.jsonl"]
    assert files_read(Source(str(folder), data_files="b.jsonl")) == ["b.jsonl"]
    for source, message in [
        (Source("json"), "data_files: FILE"),
        (Source("json", data_files={"train": a}, split="test"), "no split 'test'"),
        (Source("json", data_files=str(folder / "*.csv")), "no file matches"),
        (Source(a, split="test"), "has no split 'test'"),
        (Source(a, data_files=b), "have no effect"),
        (Source(a, name="en"), "no configurations"),
    ]:
        with pytest.raises(DataError, match=message):
            collect(source)


@pytest.mark.parametrize(
    ("split", "kept"), [("train[:2]", "012345"[:2]), ("train[-1:]", "5"), ("train[50%:]", "345"), ("train[1:3]", "12")]
)
def test_slices_of_local_files(split: str, kept: str, tmp_path: Path) -> None:
    """Guards against `train[:10%]` meaning something on the hub and nothing for a file."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"input": "Number?", "output": str(n)} for n in range(6)]))
    assert "".join(files_read(Source(str(file), split=split))) == kept


@pytest.mark.parametrize("split", ["train[3:2]", "train[9:]", "train[:1%]"])
def test_a_slice_without_a_row_is_refused(split: str, tmp_path: Path) -> None:
    """Guards against a traceback (IndexError) where a slice of a file holds no row."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"input": "Number?", "output": str(n)} for n in range(6)]))
    with pytest.raises(DataError, match=r"train.* holds no row") as caught:
        collect(Source(str(file), split=split))
    assert "6 rows" in caught.value.why and caught.value.help


def test_the_hub_loader_is_used_for_what_is_not_local(tmp_path: Path) -> None:
    """Guards the way of a hub id, with the loader's own `text` builder, which needs no network."""
    file = tmp_path / "a.txt"
    file.write_text("One line.\nAnother line.\n")
    rows = collect(Source("text", data_files=str(file)))
    assert rows.examples == [{"text": "One line."}, {"text": "Another line."}]
    assert rows.where == ["text[train] row 1", "text[train] row 2"]


def test_an_id_that_the_hub_does_not_know(tiny: Path, write_recipe: Callable[..., Path]) -> None:
    """Guards against the loader's own errors, of which there are dozens of classes."""
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name="data/techco")
    done = script("sft", "--recipe", recipe)
    assert done.code == 2 and "Traceback" not in done.err, done
    assert "'data/techco' (split train) could not be loaded" in done.err, done
    assert "did you mean 'data/techco.jsonl'" in done.err, done
