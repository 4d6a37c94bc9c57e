"""lm-eval without a hub: a task made of a data file, and what goes wrong with public ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import ROOT, script
from stepladder.data import mixture
from stepladder.errors import DataError, RunError
from stepladder.evaluation import harness


def test_a_local_task_holds_each_answer_once(tmp_path: Path) -> None:
    """Guards the task against a wrong key, two equal choices, and an order that tells the answer."""
    rows = mixture.from_name(str(ROOT / "data/techco_eval.jsonl"))
    task = harness.local_task(rows, tmp_path)
    made = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert len(made) == len(rows)
    for row, example in zip(made, rows.examples, strict=True):
        assert row["choices"][row["answer"]] == example["messages"][-1]["content"] and len(set(row["choices"])) == 4
    assert {row["answer"] for row in made} == {0, 1, 2, 3}
    with pytest.raises(DataError, match="2 different answers"):
        harness.local_task(rows.take([0, 1]), tmp_path)


def test_two_models_are_scored_side_by_side_without_a_hub(tiny, tmp_path: Path) -> None:
    """Guards the harness's seams: a local task, models of ours, and scores that a program can read."""
    (tmp_path / "same").symlink_to(tiny)
    words = (
        "--model",
        tiny,
        "--model",
        tmp_path / "same",
        "--tasks",
        ROOT / "data/techco_eval.jsonl",
        "--limit",
        8,
        "--json",
    )
    done = script("evaluate", *words)
    assert done.code == 0, done
    first, second = json.loads(done.out.strip().splitlines()[-1]).values()
    assert first == second and [score["metric"] for score in first] == ["acc", "acc_norm"]
    assert all(score["task"] == "techco_eval" and 0 <= score["value"] <= 1 and score["error"] > 0 for score in first)


def test_what_would_be_one_column_or_row_is_refused(tiny, tmp_path: Path) -> None:
    """Guards against two data files of one name, of which one was scored, and a model that is given twice."""
    copy = tmp_path / "techco_eval.jsonl"
    copy.write_bytes((ROOT / "data/techco_eval.jsonl").read_bytes())
    done = script("evaluate", "--model", tiny, "--tasks", "data/techco_eval.jsonl", copy)
    assert done.code == 2 and "two tasks are called 'techco_eval'" in done.err and not done.out, done
    done = script("evaluate", "--model", tiny, "--model", tiny, "--tasks", copy)
    assert done.code == 2 and "is given twice" in done.err, done
    names = ("mmlu.sub/task", "arc_easy", str(copy), "no-such.jsonl")
    assert [harness.is_data(name) for name in names] == [False, False, True, True]


def test_tasks_that_cannot_be_had_are_named(tiny) -> None:
    with pytest.raises(RunError, match="no task 'arc_esy'"):
        harness.evaluate(str(tiny), ["arc_esy"], None, 8)
    done = script("evaluate", "--model", tiny, "--tasks", "arc_easy")
    assert done.code == 2 and "need a hub" in done.err and "Traceback" not in done.err, done


def test_a_cache_that_cannot_be_written_is_one_message(tiny) -> None:
    """Guards a home that is read-only: lm-eval copies a file's rows into the cache of `datasets`."""
    words = ("--model", tiny, "--tasks", ROOT / "data/techco_eval.jsonl", "--limit", 2)
    done = script("evaluate", *words, HF_HOME="/dev/null")
    assert done.code == 2 and "help: HF_HOME=DIR" in done.err and "Traceback" not in done.err, done
