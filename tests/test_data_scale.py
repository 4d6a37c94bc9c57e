"""Sets of any size, and rows of any length, within bounded memory."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from conftest import script
from stepladder.data import audit, copies, file_list, mixture, prepare, render
from stepladder.data.file_list import FileList, join
from stepladder.data.row_checks import ANSWER_CUT, Limits, check_texts, check_tokens
from stepladder.data.row_renderer import Remarks
from stepladder.data.rows import Rows
from stepladder.errors import RunError

INDEX = 150  # bytes per row that may be held: positions, lengths, and the bands of the search for copies


@pytest.fixture
def tokenizer(tiny: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def write_rows(file: Path, count: int) -> Path:
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(count):
            asked, said = (" ".join(draw.choices("abcdefghijklmnop", k=most)) for most in (10, 60))
            out.write(json.dumps({"input": asked, "output": said}) + "\n")
    return file


@pytest.mark.parametrize("part", ["prepare", "audit"])
def test_memory_does_not_grow_with_the_rows(part, tokenizer, settings, tmp_path, monkeypatch) -> None:
    """Guards a million rows: as lists of Python objects, rows, tokens and texts took 28 KB a row."""
    for module, name, value in (
        (render, "BATCH", 20),
        (render, "WRITTEN", 2000),
        (file_list, "WRITTEN", 1 << 12),
        (file_list, "READ", 1 << 12),
    ):
        monkeypatch.setattr(module, name, value)  # what is held at once is held of few rows too
    keys = settings(max_length=256, seed=1)

    def peak(count: int) -> int:
        file = write_rows(tmp_path / f"{count}.jsonl", count)
        tracemalloc.start()
        rows = mixture.from_name(str(file))
        if part == "prepare":
            train, evaluation = mixture._split([rows], 0.1, keys)
            rows = Rows.join([*train, *evaluation])
            rows.fingerprint()
            with (tmp_path / "rows.arrow").open("wb") as out:
                render.write(out, rows, tokenizer, keys, 0, Remarks())
        else:
            check_texts(rows, Limits())
            check_tokens(rows, tokenizer, keys)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(20)  # what is learnt of the template, and imported, once
    few, many = peak(300), peak(1200)
    assert many - few < 900 * INDEX


def test_lists_in_files_are_lists(tmp_path, monkeypatch) -> None:
    """Guards the rows behind the index: buffers' edges, an item larger than a buffer, joined and taken parts."""
    monkeypatch.setattr(file_list, "WRITTEN", 100)
    monkeypatch.setattr(file_list, "READ", 64)
    draw = random.Random(3)
    items = [{"text": "ä\ud83d" * draw.randrange(60), "n": [n, None, 1.5, True]} for n in range(200)]
    held = FileList(items)
    assert len(held) == 200 and list(held) == items and held == items and held != items[1:]
    assert held[7] == items[7] and held[-1] == items[-1] and held[3:90:7] == items[3:90:7]
    both = join([held, [], FileList(["x" * 1000, "y"])])
    picked = [201, 5, 200, 5, 199]
    assert isinstance(both, FileList) and both.take(picked) == [[*items, "x" * 1000, "y"][n] for n in picked]
    assert join([held, ["in memory"]]) == [*items, "in memory"]
    with pytest.raises(IndexError):
        held[200]


@pytest.fixture
def full_disk(tmp_path, monkeypatch) -> None:
    """A disk of the cache that is full after the first rows."""
    write = file_list._write
    monkeypatch.setattr(file_list, "WRITTEN", 100)
    monkeypatch.setattr(file_list, "_newest", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = tmp_path.stat().st_dev

    def fill(file, content: bytes, position: int) -> None:
        if os.fstat(file.fileno()).st_dev == device and position + len(content) > 1000:
            write(file, content[:30], position)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content, position)

    monkeypatch.setattr(file_list, "_write", fill)


@pytest.mark.parametrize("read", [mixture.from_name, lambda name: audit.audit_source(name, Limits())])
def test_a_full_disk_stops_with_a_reason(read, full_disk, tmp_path, monkeypatch) -> None:
    """Guards against a traceback where the rows do not fit on the disk, and against an audit that lists them as bad."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = write_rows(tmp_path / "rows.jsonl", 50)
    with pytest.raises(RunError, match="written nowhere") as caught:
        read(str(file))
    assert "No space left" in caught.value.why and "XDG_CACHE_HOME" in caught.value.help


def test_rows_move_where_the_disk_of_the_cache_is_full(full_disk, tmp_path, monkeypatch) -> None:
    """Guards a run on a node whose home is full: it stopped, though /tmp had room."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk")
    monkeypatch.setattr(tempfile, "tempdir", str(memory))
    items = [{"text": "ä" * number} for number in range(80)]
    held = FileList(items[:10])
    before = iter(held)
    assert next(before) == items[0]
    for item in items[10:]:
        held.append(item)
    assert list(held) == items and list(before) == items[1:]


def test_copies_are_those_that_a_comparison_of_all_pairs_finds() -> None:
    """Guards the search by sketches: what it finds are copies, and hardly a copy is missed."""
    draw = random.Random(5)
    texts = [" ".join(draw.choices(["owl", "barn", "mouse", "night", "wing"], k=40)) for _ in range(12)]
    rows = []
    for _ in range(150):
        words = draw.choice(texts).split()
        for _ in range(draw.choice((0, 1, 2, 12))):
            words[draw.randrange(40)] = draw.choice("xyz") * 3
        rows.append({"text": " ".join(words)})
    own = 120

    def alike(i: int, j: int) -> float:
        one, other = ({text[k : k + 5] for k in range(len(text) - 4)} for text in (rows[i]["text"], rows[j]["text"]))
        return len(one & other) / len(one | other)

    exact, near = ([*zip(*pairs, strict=True)] for pairs in copies.find(FileList(rows), own))
    same = {i: min(j for j in range(i + 1) if rows[j] == rows[i]) for i in range(150)}
    assert exact == [(i, j) for i, j in same.items() if j < min(i, own)]
    assert all(j < min(i, own) and alike(i, j) >= 0.8 for i, j in near)
    found = dict(near)
    stand = [i for i in range(own) if same[i] == i and i not in found]
    rest = [i for i in range(150) if i not in found and i not in dict(exact)]
    missed = [(i, j) for i, j in itertools.product(rest, stand) if j < i and alike(i, j) >= 0.9]
    assert len(near) > 20 and not missed


def test_of_a_very_long_row_the_first_tokens_are_those_of_the_whole(tokenizer, settings, monkeypatch) -> None:
    """Guards the tokens, labels and ends of rows of which only the beginning is tokenized, and that it is said."""
    answers = ["The owl saw a mouse 🐭 and flew. " * 120, "x" * 6000, "No more."]
    turns = [
        {"role": role, "content": text}
        for text in answers
        for role, text in (("user", "What then, in short?"), ("assistant", text))
    ]
    rows = Rows("r", [{"messages": turns}, {"text": "¡Hola! 你好 owl. " * 400}], ["r:1", "r:2"])
    whole = list(render.tokenize(rows, tokenizer, "all_turns"))
    monkeypatch.setattr(render, "LONG", 1000)
    monkeypatch.setattr(render, "MARGIN", 20)
    for length in (10, 100, 500):
        remarks = Remarks()
        for one, other in zip(whole, render.tokenize(rows, tokenizer, "all_turns", remarks, length), strict=True):
            assert length < len(other.ids) < len(one.ids) and not other.is_whole
            assert (one.ids[:length], one.labels[:length]) == (other.ids[:length], other.labels[:length])
            assert [end for end in one.ends if end < length] == [end for end in other.ends if end < length]
        (note,) = [note for note in remarks.notes(rows.where) if "1,000,000" in note]
        assert note.startswith("2 of 2 rows") and "the first at r:1" in note
    assert [row.ids for row in render.tokenize(rows, tokenizer, "all_turns", None, 9000)] == [row.ids for row in whole]


def test_an_answer_behind_a_very_long_question_is_cut_off(tokenizer, settings, monkeypatch) -> None:
    """Guards the advice: the row was said to train nothing, and to be removed, where max_length cuts its answer off."""
    monkeypatch.setattr(render, "LONG", 1000)
    monkeypatch.setattr(render, "MARGIN", 20)
    turns = [{"role": "user", "content": "What did the owl do? " * 800}, {"role": "assistant", "content": "It flew."}]
    rows = Rows("r", [{"messages": turns}], ["r:1"])
    (error,) = (found for found in check_tokens(rows, tokenizer, settings(max_length=64)) if found.name == ANSWER_CUT)
    assert list(error.where) == ["r:1"] and "max_length 64 cuts off the whole answer" in error.what


def test_a_row_of_twenty_megabytes(tiny, write_recipe, tmp_path) -> None:
    """Guards a file whose line breaks are missing: it took 4.7 GiB, more than a laptop has beside its desktop.

    With max_length it is trained cut, as the note says; without, all of it would be one sequence, and is refused.
    """
    file = write_rows(tmp_path / "rows.jsonl", 3)
    row = {"input": "Tell me all of it.", "output": "The owl flew over the barn. " * 720_000}
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    recipe = write_recipe(model_name_or_path=str(tiny), dataset_name=str(file), max_length=256)
    done = script("check", "--recipe", recipe, "--audit", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.out)["findings"]}
    assert done.code == 0 and findings["long_text"]["where"] == findings["cut"]["where"] == [f"{file}:4"], done
    assert "keeps all" not in findings["cut"]["help"], "how many tokens it has is not known"
    done = script("check", "--recipe", recipe, "--audit", "--max_length", "null")
    assert done.code == 2 and f"{file}:4: the row is a text of 20,160," in done.out, done


def test_lengths_come_as_an_array(tokenizer, settings, tmp_path) -> None:
    """Guards the order of a million rows: a list of Python integers is ten times as large, on every rank."""
    rows = mixture.from_name(str(write_rows(tmp_path / "rows.jsonl", 30)))
    dataset, _ = prepare.render_parallel(rows, tokenizer, settings(max_length=100), tmp_path / "parts")
    assert prepare.lengths(dataset).nbytes == 4 * 30
    assert prepare.lengths(dataset).tolist() == [len(row["input_ids"]) for row in dataset]
