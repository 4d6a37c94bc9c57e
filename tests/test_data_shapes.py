"""Shapes in which people keep rows: JSON documents, folders of other tools, and files that are no data."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
import yaml

from conftest import script
from stepladder.data import json_documents, read, readers
from stepladder.data.source import Source, has_split
from stepladder.errors import DataError, locate_errors

A, B, C = ({"input": f"{letter}?", "output": f'{letter}, "é" 🎉\n007'} for letter in "ABC")
ROWS = [A, B]
TURNS = {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "A."}]}
PAIR = {"prompt": TURNS["messages"][:1], "completion": TURNS["messages"][1:]}
COLUMNS = {"input": ["A?", "B?"], "output": [A["output"], B["output"]]}
FRAME = pandas.DataFrame(ROWS)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:6652\nsize 146946961\n"


def rows(path: Path | str, **keys: Any) -> list[dict[str, Any]]:
    """The rows of a set; the first bad one is raised."""
    found = []
    for where, row in Source(str(path), **keys).rows():
        if isinstance(row, DataError):
            raise row
        assert str(path) in where
        found.append(row)
    return found


def message(path: Path | str, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows(path, **keys)
    return str(caught.value)


def jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


DOCUMENTS: dict[str, tuple[str, list[Any]]] = {  # content, and its rows
    "objects": (f"{pretty(A)}\n\n{pretty(B)}\n", ROWS),
    "one object": (pretty(A), [A]),
    "one conversation": (json.dumps(TURNS), [TURNS]),
    "one pretty conversation": (pretty(TURNS), [TURNS]),
    "one conversational pair": (json.dumps(PAIR), [PAIR]),
    "one row with tools": (
        pretty({**TURNS, "tools": [{"type": "function"}]}),
        [{**TURNS, "tools": [{"type": "function"}]}],
    ),
    "data": (pretty({"data": ROWS}), ROWS),
    "rows": (json.dumps({"rows": ROWS}), ROWS),
    "any one key": (json.dumps({"alpaca_en": ROWS}), ROWS),
    "splits": (pretty({"test": [C], "train": ROWS}), ROWS),
    "named splits": (json.dumps({"test_sft": [C], "train_sft": ROWS}), ROWS),
    "columns": (json.dumps(COLUMNS), ROWS),
    "columns of conversations": (json.dumps({"messages": [TURNS["messages"]] * 2}), [TURNS] * 2),
    "pandas": (FRAME.to_json(), ROWS),
    "pandas by index": (FRAME.to_json(orient="index"), ROWS),
    "pandas records": (FRAME.to_json(orient="records", indent=1), ROWS),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_documents(name: str, suffix: str, tmp_path: Path) -> None:
    """Guards against a JSON file of usual shape that is refused, or whose wrapping is taken for a row."""
    content, expected = DOCUMENTS[name]
    file = tmp_path / f"a{suffix}"
    file.write_text(content)
    assert rows(file) == expected


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("name", ["objects", "pandas records", "data"])
def test_json_is_read_in_pieces(name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a value, a character or a line number that is lost where two pieces of a file meet."""
    content, expected = DOCUMENTS[name]
    file = tmp_path / "a.json"
    file.write_text(content)
    cut = tmp_path / "cut.json"
    cut.write_text(content.rstrip()[:-20] + "\n ?")
    whole, fault = list(read.read(file)), message(cut)
    monkeypatch.setattr(json_documents, "PIECE", piece)
    assert list(read.read(file)) == whole and [row for _, row in whole] == expected
    assert message(cut) == fault


BAD_DOCUMENTS: dict[str, tuple[str, list[str]]] = {  # content, and what the message says
    "version beside": (pretty({"version": 1, "data": ROWS}), ["'data' holds the rows", "'version'", "python -c"]),
    "unequal columns": (json.dumps({"input": ["a", "b"], "output": ["c"]}), ["'input' 2, 'output' 1"]),
    "pandas split": (FRAME.to_json(orient="split"), ["orient='split'", "orient='records'"]),
    "no such split": (json.dumps({"test": ROWS, "dev": ROWS}), ["'test', 'dev'", "'train' is asked for"]),
    "two such splits": (json.dumps({"train_a": ROWS, "train_b": ROWS}), ["'train_a', 'train_b'"]),
    "text in a wrapper": (json.dumps({"train": [A, "b"]}), ["row 2 of 'train'", "not a JSON object but 'b'"]),
    "empty wrapper": (json.dumps({"data": []}), ["holds no rows"]),
    "cut objects": (pretty(A) + "\n" + pretty(B)[:-4], [":7:13", "invalid JSON"]),
    "key twice": ('{"data": [{"input": "a", "input": "b"}]}', ["'input' stands there twice"]),
    "comma between": (f"{pretty(A)},\n{pretty(B)}", [":4:2", "invalid JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_json_documents(name: str, tmp_path: Path) -> None:
    """Guards against a document that is read in part, or under a message without its cause."""
    content, parts = BAD_DOCUMENTS[name]
    file = tmp_path / "a.json"
    file.write_text(content)
    found = message(file)
    assert all(part in found for part in [str(file), *parts]), found


def test_a_cut_first_line_is_one_bad_row(tmp_path: Path) -> None:
    """Guards against JSONL taken for a pretty-printed document because its first line is half written."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"input": "a",\n' + json.dumps(A) + "\n" + json.dumps(B) + "\n")
    found = list(read.read(file))
    assert [where for where, _ in found] == [f"{file}:{line}" for line in (1, 2, 3)]
    assert isinstance(found[0][1], DataError) and [row for _, row in found[1:]] == ROWS


def test_a_json_file_of_several_splits(tmp_path: Path) -> None:
    """Guards against evaluating on training rows where one file holds both splits."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"train": ROWS, "test": [C]}))
    assert rows(file, split="test") == [C] and rows(file, split="train[1:]") == [B]
    assert has_split(file, "test") and not has_split(file, "validation")
    assert "'train', 'test'" in message(file, split="validation")
    assert "has no split 'test'" in message(jsonl(tmp_path / "b.jsonl", ROWS), split="test")


def test_the_one_command_for_a_wrapped_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a hint that does not give the rows when it is followed."""
    file = tmp_path / "a file.json"
    file.write_text(json.dumps({"version": 1, "data": ROWS}))
    command = shlex.split(message(file).split("help: ")[1].splitlines()[0])
    assert command[:2] == ["python", "-c"] and command[3:] == [">", f"{file}.jsonl"]
    exec(command[2], {})
    Path(command[4]).write_text(capsys.readouterr().out)
    assert rows(command[4]) == ROWS


CSV: dict[str, tuple[str, Any]] = {  # content, and its rows or what the message says
    "in every line": ("input,output,,\na,b,,\nc,d,,\n", [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]),
    "in the header": ("input;output;\na;b\n", [{"input": "a", "output": "b"}]),
    "an index": (",input,output\n0,a,b\n", [{"": "0", "input": "a", "output": "b"}]),
    "a cell without a name": ("input,output,,\na,b,,\nc,d,,more\n", ":3: 'more' stands under an empty header"),
    "in a row alone": ("input,output\na,b,\n", ":2: 3 cells where the header has 2"),
    "no header": (",,\na,b,c\n", ":1: the header's cells are empty"),
}


@pytest.mark.parametrize("name", CSV)
def test_separators_at_the_end_of_csv_lines(name: str, tmp_path: Path) -> None:
    """Guards against spreadsheets' empty last columns, and against a cell that is dropped because it has no name."""
    content, expected = CSV[name]
    file = tmp_path / "a.csv"
    file.write_text(content)
    assert (message(file) if isinstance(expected, str) else rows(file)) == expected or expected in message(file)


MESSAGES = [{"role": "user", "content": 'it\'s "x"\n\\d'}, {"role": "assistant", "content": "y", "weight": None}]
NUMPY = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"


@pytest.mark.parametrize("value", [MESSAGES, MESSAGES[0], [], {"a": [True, 1.5, {"b": None}]}])
@pytest.mark.parametrize("dump", [json.dumps, repr])
def test_lists_in_a_cell(value: Any, dump: Callable[[Any], str]) -> None:
    """Guards against a conversation that pandas wrote as Python prints it."""
    assert readers.parse_nested(f" {dump(value)}\n", "the conversation") == value


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (NUMPY, "as NumPy and pandas print it"),
        ("array([{'role': 'user'}], dtype=object)", "is not JSON"),
        ("[{'tools': array(['a', 'b'], dtype=object)}]", "as NumPy and pandas print it"),
        ("[{'role': open('x')}]", "is not JSON"),
        ("{'role': 'a', 'role': 'b'}", "is not JSON"),
        ('{"role": "a", "role": "b"}', "'role' stands there twice"),
        ("[" * 100_000, "is not JSON"),
        ("[" + "-" * 100_000 + "1]", "is not JSON"),
        ("[" + "1+" * 100_000 + "1]", "is not JSON"),
        ("[" + "9" * 10_000 + "]", "is not JSON"),
        ("[" + "'a', " * 300_000 + "]", "is not JSON"),
        ("", "is not JSON"),
        ("Hello", "is not JSON"),
    ],
)
def test_a_cell_that_holds_no_list(text: str, part: str) -> None:
    """Guards against code that runs, a parser that is led into the ground, and pandas' arrays read in part."""
    with pytest.raises(DataError) as caught, locate_errors("a.csv:2"):
        readers.parse_nested(text, "the conversation")
    assert part in str(caught.value) and "a.csv:2" in str(caught.value)


def saved(folder: Path, content: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(content).save_to_disk(folder)
    return folder


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    """Guards against a saved Dataset that is refused, whose metadata is read as rows, or whose splits are mixed."""
    one, several, apart = saved(tmp_path / "one", ROWS), tmp_path / "several", tmp_path / "apart"
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list([C])).save_to_disk(
        several
    )
    saved(apart / "train", ROWS), saved(apart / "test", [C])
    (one / "cache-0123.arrow").write_bytes(b"left by Dataset.map")
    assert list(read.read(one)) == [(f"{one}: row 1", A), (f"{one}: row 2", B)]
    for folder in (one, several, apart):
        assert rows(folder) == ROWS
    for folder in (several, apart):
        assert rows(folder, split="test") == [C] == rows(folder / "test") and has_split(folder, "test")
    assert not has_split(one, "test")
    assert "one of test, train" in message(several, split="dev")
    assert rows(next(one.glob("data-*.arrow"))) == ROWS


def test_columns_that_a_saved_set_hides(tmp_path: Path) -> None:
    """Guards against tensors as texts, and against columns that `set_format` left out."""
    content = [{**row, "note": "x", "turns": [{"a": "1"}, {"b": "2"}]} for row in ROWS]
    datasets.Dataset.from_list(content).with_format("numpy", columns=["input", "turns"]).save_to_disk(tmp_path / "a")
    assert rows(tmp_path / "a") == [{"input": row["input"], "turns": [{"a": "1"}, {"b": "2"}]} for row in ROWS]


def test_damaged_folders_of_save_to_disk(tmp_path: Path) -> None:
    """Guards against a traceback, and against rows beside a saved set that nobody reads."""
    damages: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "state.json": ("cannot be loaded", lambda folder: (folder / "state.json").write_text("{")),
        "cut": ("cannot be loaded", lambda folder: os.truncate(next(folder.glob("*.arrow")), 100)),
        "gone": ("cannot be loaded", lambda folder: next(folder.glob("*.arrow")).unlink()),
        "pointer": ("git-lfs", lambda folder: next(folder.glob("*.arrow")).write_text(POINTER)),
        "more": ("extra.jsonl, which would not be read", lambda folder: jsonl(folder / "extra.jsonl", [C])),
    }
    for name, (part, damage) in damages.items():
        folder = saved(tmp_path / name, ROWS)
        damage(folder)
        assert part in message(folder), name


def clone(folder: Path, configs: str, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A git clone of a hub data set, with the metadata that such clones have."""
    for name, content in files.items():
        jsonl(folder / name, content)
    (folder / "README.md").write_text(f"---\nlicense: mit\n{configs}---\n# A set\n\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    jsonl(folder / ".cache" / "train.jsonl", [C])
    return folder


def test_a_clone_of_a_hub_set(tmp_path: Path) -> None:
    """Guards against metadata read as rows, and against files that the set's README gives to no split or another."""
    plain = clone(tmp_path / "plain", "", {"train.jsonl": ROWS, "test.jsonl": [C]})
    assert rows(plain) == ROWS and rows(plain, split="test") == [C]
    assert "describes a data set and holds no rows" in message(plain / "dataset_infos.json")
    files = {"data/a-1.jsonl": [A], "data/a-2.jsonl": [B], "data/held_out.jsonl": [C], "raw/all.jsonl": [A, B, C]}
    listed = [{"split": "train", "path": "data/a-*"}, {"split": "test", "path": ["data/held_out.jsonl"]}]
    one = clone(tmp_path / "one", yaml.safe_dump({"configs": [{"config_name": "x", "data_files": listed}]}), files)
    assert rows(one) == ROWS and rows(one, split="test") == [C] and has_split(one, "test")
    assert "one of train, test" in message(one, split="dev")
    gone = clone(tmp_path / "gone", yaml.safe_dump({"configs": [{"data_files": "en-*"}]}), {"fr.jsonl": [C]})
    assert "no file of" in message(gone) and "'en-*'" in message(gone)
    broken = clone(tmp_path / "broken", "configs: [\n", {"fr.jsonl": [C]})
    assert "README.md: its front matter is not valid YAML" in message(broken)


def test_the_configurations_of_a_hub_set(tmp_path: Path) -> None:
    """Guards against two languages trained as one set."""
    configs: list[dict[str, Any]] = [
        {"config_name": "en", "data_files": "en.jsonl"},
        {"config_name": "fr", "data_dir": "data", "data_files": ["fr.jsonl"]},
    ]
    folder = clone(tmp_path / "a", yaml.safe_dump({"configs": configs}), {"en.jsonl": ROWS, "data/fr.jsonl": [C]})
    assert "several configurations" in message(folder) and "dataset_config: en" in message(folder)
    assert rows(folder, name="en") == ROWS and rows(folder, name="fr") == [C]
    assert "no configuration 'de'" in message(folder, name="de")
    configs[1]["default"] = True
    clone(folder, yaml.safe_dump({"configs": configs}), {})
    assert rows(folder) == [C]


LLAMA_FACTORY = {
    "absent": {"file_name": "absent.json"},
    "pairs": {"file_name": "pairs.json", "columns": {"prompt": "question", "query": "note", "response": "answer"}},
    "turns": {
        "file_name": "turns.json",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"},
    },
    "preference": {"file_name": "dpo.json", "ranking": True},
    "hub": {"hf_hub_url": "org/wiki", "subset": "en", "columns": {"prompt": "body"}},
    "script": {"script_url": "load.py"},
}


def test_a_data_folder_of_llama_factory(tmp_path: Path) -> None:
    """Guards against training on `dataset_info.json`, and against lines that do not read the set they stand for."""
    (tmp_path / "dataset_info.json").write_text(json.dumps(LLAMA_FACTORY))
    (tmp_path / "pairs.json").write_text(json.dumps([{"question": "A?", "note": "n", "answer": "B"}]))
    (tmp_path / "turns.json").write_text(json.dumps([{"dialog": TURNS["messages"]}]))
    found = message(tmp_path)
    assert found.split("help:")[1] == message(tmp_path / "dataset_info.json").split("help:")[1]
    assert f"{tmp_path} is a data folder of LLaMA-Factory" in found and "lists 6 sets; 2 of them" in found
    lines = [line.strip() for line in found.split("one of them:\n")[1].splitlines()]
    assert lines == [
        "pairs:",
        f"dataset_name: {tmp_path}/pairs.json",
        "column_map: {instruction: question, input: note, output: answer}",
        "turns:",
        f"dataset_name: {tmp_path}/turns.json",
        "column_map: {messages: dialog}",
        "role_map: {bot: assistant}",
        "absent:",
        f"dataset_name: {tmp_path}/absent.json",
        "hub:",
        "dataset_name: org/wiki",
        "dataset_config: en",
        "column_map: {text: body}",
    ]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "dataset_info.json").write_text("{")
    assert "dataset_info.json: it cannot be read" in message(tmp_path / "cut")
    recipe = yaml.safe_load("\n".join(lines[1:3]))
    assert rows(recipe["dataset_name"], column_map=recipe["column_map"]) == [
        {"instruction": "A?", "input": "n", "output": "B"}
    ]
    done = script("check", "--data", str(tmp_path))
    assert done.code == 2 and "Traceback" not in done.err, done
    assert "a data folder of LLaMA-Factory" in done.out + done.err, done


CONVERTED: dict[str, Callable[[Path], Any]] = {
    "a.pkl": lambda file: FRAME.to_pickle(file),
    "a.pickle": lambda file: file.write_bytes(pickle.dumps(ROWS)),
    "a.yaml": lambda file: file.write_text(yaml.safe_dump(ROWS)),
    "a.npy": lambda file: numpy.save(file, numpy.array(ROWS, dtype=object)),
    "a.xlsx": lambda file: file.write_bytes(b"PK\3\4"),
    "a b.TXT": lambda file: file.write_text("First 'line'.\n\n  \"Second\"\n"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_the_one_command_for_another_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a command that fails or changes a text when it is followed."""
    file = tmp_path / name
    CONVERTED[name](file)
    # What it must be asked for to keep 007 and "NA" as they stand; the library that reads workbooks is optional.
    keep = {"dtype": str, "keep_default_na": False}
    monkeypatch.setattr(pandas, "read_excel", lambda _, **keys: FRAME if keys == keep else None)
    found = message(file)
    assert f"files of the kind '{file.suffix}' are not read" in found
    command = shlex.split(found.split("help: ")[1])
    assert command[:2] == ["python", "-c"] and len(command) == 3
    exec(command[2], {})
    texts = [{"text": "First 'line'."}, {"text": '  "Second"'}]
    assert rows(f"{file}.jsonl") == (texts if file.suffix == ".TXT" else ROWS)


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    """Guards against advice about UTF-8 for a file that is packed, a pointer, or a web page."""
    parquet = tmp_path / "a.parquet"
    FRAME.to_parquet(parquet)
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "a.parquet")
    content: dict[str, tuple[bytes, str]] = {
        "lfs.parquet": (POINTER.encode(), f"git -C {tmp_path} lfs pull"),
        "lfs.jsonl.gz": (POINTER.encode(), "git-lfs"),
        "page.jsonl": (b"<!DOCTYPE HTML>\n<html>", "is a web page"),
        "gz.jsonl": (b"\x1f\x8b\x08\0", f"mv {tmp_path}/gz.jsonl {tmp_path}/gz.jsonl.gz"),
        "parquet.jsonl": (parquet.read_bytes(), "is a .parquet file by its content"),
        "zip.json": ((tmp_path / "a.zip").read_bytes(), "is a .zip file by its content"),
        "rows.txt": (json.dumps(A).encode(), f"mv {tmp_path}/rows.txt {tmp_path}/rows.txt.jsonl"),
        "rows": (json.dumps(ROWS).encode(), "its content looks like JSON"),
        "utf16.jsonl": (json.dumps(A).encode("utf-16-le"), "is UTF-16"),
        "utf32.json": (json.dumps(ROWS).encode("utf-32"), "is UTF-16 or UTF-32"),
    }
    for name, (held, part) in content.items():
        (tmp_path / name).write_bytes(held)
        assert part in message(tmp_path / name), name
    command = shlex.split(message(tmp_path / "a.zip").split("help: ")[1])
    exec(command[2], {})
    assert rows(tmp_path / "a.zip_unpacked") == ROWS


def test_folders_read_in_part_or_twice(tmp_path: Path) -> None:
    """Guards against a workbook left out beside JSONL, and against the same rows in two kinds of file."""
    for name in ("mixed", "twice", "packed"):
        jsonl(tmp_path / name / "train.jsonl", ROWS)
    (tmp_path / "mixed" / "more.xlsx").write_bytes(b"PK")
    FRAME.to_csv(tmp_path / "twice" / "train.csv")
    (tmp_path / "packed" / "train.jsonl.gz").write_bytes(b"")
    assert "more.xlsx, which would not be read, beside train.jsonl" in message(tmp_path / "mixed")
    assert rows(tmp_path / "mixed", data_files="train.jsonl") == ROWS
    assert "train.csv and train.jsonl" in message(tmp_path / "twice")
    assert "train.jsonl and train.jsonl.gz" in message(tmp_path / "packed")
    (tmp_path / "mixed" / "train.jsonl").unlink()
    assert "a spreadsheet" in message(tmp_path / "mixed")


def test_links_and_pipes(tmp_path: Path) -> None:
    """Guards against a hang, an endless walk, and shards that a broken link leaves out without a word."""
    folder = tmp_path / "set"
    jsonl(folder / "a.jsonl", [A])
    jsonl(tmp_path / "elsewhere" / "b.jsonl", [B])
    (folder / "link").symlink_to("../elsewhere")
    (folder / "loop").symlink_to(".")
    assert rows(folder) == ROWS
    (folder / "up").symlink_to("/")
    assert f"up is a link to /, which holds {folder}" in message(folder)
    (folder / "up").unlink()
    (folder / "c.jsonl").symlink_to("gone")
    assert "c.jsonl is a link to 'gone', which is not there" in message(folder)
    (folder / "c.jsonl").unlink()
    os.mkfifo(folder / "c.jsonl")
    assert "c.jsonl is a pipe, socket or device" in message(folder)
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    assert "symbolic links" in message(tmp_path / "self.jsonl")


def test_odd_names_and_forbidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a name that writes to the terminal, and against 'damaged' for a file that may not be read."""
    odd = tmp_path / "a\n\x1b[31m\udcff.jsonl"
    odd.write_text(json.dumps(A) + "\n{bad\n")
    (where, _), (_, fault) = read.read(odd)
    assert where == f"{tmp_path}/a\\n\\x1b[31m\\udcff.jsonl:1" and "\x1b" not in str(fault)
    str(fault).encode()

    def forbid(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(read, "_open", forbid)
    assert "may not be read" in message(jsonl(tmp_path / "b.jsonl", [A]))
