"""Preparation: once a node, cached by content, the same whether one process does it or several."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import launch, losses, manifest, script
from stepladder import files
from stepladder.data import mixture, prepare, render
from stepladder.errors import DataError, ModelError


@pytest.fixture
def tokenizer(tiny: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/stepladder/prepared"


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many rows were rendered, call by call."""
    calls: list[int] = []
    real = render.write
    monkeypatch.setattr(render, "write", lambda out, rows, *args: calls.append(len(rows)) or real(out, rows, *args))
    return calls


def test_the_same_content_is_prepared_once(learnable, tokenizer, settings, cached, made, tmp_path) -> None:
    """Guards the cache's key: it holds what the result follows from, and not where the file lies."""
    rows = mixture.from_name(str(learnable))
    folder = prepare.prepare_rows(rows, None, tokenizer, settings(max_length=160))
    train, evaluation = prepare.open_prepared(folder)
    assert len(train) == 8 and evaluation is None and made == [8]
    assert train[3]["rows"] == [3] and len(train[3]["input_ids"]) == len(train[3]["labels"])

    copy = shutil.copy(learnable, tmp_path / "copy.jsonl")
    assert prepare.prepare_rows(mixture.from_name(str(copy)), None, tokenizer, settings(max_length=160)) == folder
    assert made == [8], "found by its content"
    assert prepare.prepare_rows(rows, rows, tokenizer, settings(max_length=160)) != folder
    assert prepare.prepare_rows(rows, None, tokenizer, settings(max_length=161)) != folder
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    assert prepare.prepare_rows(rows, None, tokenizer, settings(max_length=160)) != folder
    Path(copy).write_text(Path(copy).read_text().replace("owl", "cat"))
    assert prepare.prepare_rows(mixture.from_name(str(copy)), None, tokenizer, settings(max_length=160)) != folder
    assert made == [8] * 6 and len(list(cached.iterdir())) == 5


CUTS = {
    "a byte": ("train/data-00000-of-00001.arrow", lambda content: content[:-50] + b"?" + content[-49:]),
    "cut": ("train/data-00000-of-00001.arrow", lambda content: content[:100]),
    "empty": ("train/state.json", lambda content: b""),
    "notes": ("notes.json", lambda content: content[:20]),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_damaged_set_is_prepared_again(name, learnable, tokenizer, settings, cached, made, capsys) -> None:
    """Guards later runs against what a power cut left: a traceback in each of them, or other tokens."""
    rows = mixture.from_name(str(learnable))
    folder = prepare.prepare_rows(rows, None, tokenizer, settings(max_length=160))
    before = prepare.open_prepared(folder)[0].to_list()
    file, cut = CUTS[name]
    content = (folder / file).read_bytes()
    (folder / file).unlink()  # the set above has it mapped
    (folder / file).write_bytes(cut(content))
    for said in ("prepared again", ""):
        assert prepare.prepare_rows(rows, None, tokenizer, settings(max_length=160)) == folder
        assert made == [8, 8] and prepare.open_prepared(folder)[0].to_list() == before
        assert said in (out := capsys.readouterr().out) and bool(out) == bool(said)
    assert [path.name for path in cached.iterdir()] == [folder.name]


def test_several_processes_prepare_what_one_does(tokenizer, settings, tmp_path) -> None:
    """Guards the order and the numbers of the rows where processes share them."""
    rows = mixture.from_name("data/techco.jsonl")
    one, _ = prepare.render_parallel(rows, tokenizer, settings(max_length=512), tmp_path / "one")
    three, _ = prepare.render_parallel(
        rows, tokenizer, settings(max_length=512, dataset_num_proc=3), tmp_path / "three"
    )
    assert one.to_list() == three.to_list() and [row["rows"] for row in three] == [[n] for n in range(72)]


def test_processes_follow_the_jobs_cores(tokenizer, settings, monkeypatch, tmp_path) -> None:
    """Guards a job of two cores on a node of 128: as many processes as the node has cores, each with a thread of the
    tokenizer for every one of them."""
    started = []

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, processes, context, initializer, initargs):
            started.append((processes, initargs[0]))
            super().__init__(processes, "", initializer, initargs)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(prepare, "ROWS_A_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # which a process sets for itself
    folders = (tmp_path / str(number) for number in itertools.count())
    rows = mixture.from_name("data/techco.jsonl")
    for confined_to, of_job, expected in ((2, "", (2, 1)), (128, "2", (2, 1)), (128, "6", (6, 1)), (2, "6", (2, 1))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=confined_to: set(range(cores)))
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", of_job)
        prepare.render_parallel(rows, tokenizer, settings(max_length=512), next(folders))
        assert started.pop() == expected
    prepare.render_parallel(rows, tokenizer, settings(max_length=512, dataset_num_proc=2), next(folders))
    assert started.pop() == (2, 1)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    prepare.render_parallel(rows, tokenizer, settings(max_length=512), next(folders))
    assert not started, "one core, and no other process"


def test_a_bad_row_in_a_worker_is_told_as_elsewhere(tokenizer, settings, tmp_path) -> None:
    """Guards the message across the process: what, why, help and place, not a pickled traceback."""
    file = tmp_path / "rows.jsonl"
    long = {"input": "why? " * 200, "output": "because."}
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"input": "hello", "output": "world"}] * 9 + [long]))
    rows, keys = mixture.from_name(str(file)), settings(max_length=160, dataset_num_proc=2)
    with pytest.raises(DataError, match="nothing of this row is trained") as caught:
        prepare.render_parallel(rows, tokenizer, keys, tmp_path / "parts")
    assert caught.value.where == f"{file}:10" and "raise max_length" in caught.value.help
    assert "first 160 tokens" in caught.value.why and caught.value.kind == "data"


def test_without_a_place_to_write_it_says_so(learnable, tokenizer, settings, tmp_path, monkeypatch) -> None:
    """Guards full and read-only homes: the job's own temporary folder, and a clear end where there is none."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rows = mixture.from_name(str(learnable))
    folder = prepare.prepare_rows(rows, None, tokenizer, settings(max_length=160))
    assert "stepladder-" in str(folder) and len(prepare.open_prepared(folder)[0]) == 8
    monkeypatch.setattr(prepare, "_write", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(DataError, match="written nowhere") as caught:
        prepare.prepare_rows(rows, None, tokenizer, settings(max_length=160))
    assert "No space left" in caught.value.why and "XDG_CACHE_HOME" in caught.value.help


def test_nothing_is_cached_of_rows_that_cannot_be_used(learnable, tokenizer, settings, cached) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError):
        prepare.prepare_rows(mixture.from_name(str(learnable)), None, tokenizer, settings(max_length=160))
    assert not [*cached.glob("*")]


def test_packed_rows_know_what_is_in_them(learnable, tokenizer, settings, cached) -> None:
    """Guards the way back from a step to its rows, and `eval_packing` apart from `packing`."""
    rows = mixture.from_name(str(learnable))
    keys = {"max_length": 256, "packing": True, "eval_packing": False}
    train, evaluation = prepare.open_prepared(prepare.prepare_rows(rows, rows, tokenizer, settings(**keys)))
    assert len(train) < 8 == len(evaluation)
    assert sorted(number for row in train for number in row["rows"]) == list(range(8))
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in train)
    for row in train:
        first, length = row["rows"][0], row["seq_lengths"][0]
        assert row["input_ids"][:length] == evaluation[first]["input_ids"]


def test_one_rank_a_node_prepares(tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards the ranks that read nothing: they train what the first one prepared, packed or not, and evaluate it.

    `eval_packing: true` without `packing` must not let evaluation rows see each other: the loss
    before any step is that of rows by themselves.
    """
    keys = {
        "model_name_or_path": str(tiny),
        "dataset_name": str(learnable),
        "eval_dataset_name": str(learnable),
        "eval_strategy": "steps",
        "eval_on_start": True,
        "max_length": 256,
        "max_steps": 2,
        "global_batch_size": 5,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "save_strategy": "no",
    }
    own_cache = tmp_path / "cache/stepladder"
    own_cache.mkdir(parents=True)
    for keys_file in files.cache_folder().glob("keys-*.json"):  # else each rank would read TRL's keys anew
        shutil.copy(keys_file, own_cache)
    recipe = write_recipe(**keys)
    done = launch(
        "ddp", 2, "sft", "--recipe", recipe, "--output_dir", tmp_path / "two", XDG_CACHE_HOME=str(own_cache.parent)
    )
    assert done.code == 0, done
    assert "3 of 8 places empty" in done.out, done
    assert len(list((own_cache / "prepared").iterdir())) == 1
    assert manifest(tmp_path / "two")["datasets"][0]["rows"] == 8
    done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "one", "--eval_packing", "true")
    assert done.code == 0, done
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert first[0]["eval_loss"] == pytest.approx(second[0]["eval_loss"], abs=1e-5)
