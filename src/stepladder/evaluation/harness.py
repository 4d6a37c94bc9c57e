"""Benchmarks by lm-eval, EleutherAI's harness: its public tasks, and tasks made of any data set of ours.

A public task takes its data from the hub. A local one needs none: each question of a set, with its
answer and three answers to other questions; the model should find its own the likeliest. Chance is 25 %.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import installation
from stepladder.data import read
from stepladder.data.rows import Rows
from stepladder.errors import DataError, ModelError, RunError, first_line
from stepladder.evaluation.questions import extract_questions
from stepladder.model import pretrained

CHOICES, SEED = 4, 42


class Score(NamedTuple):
    """`error` is the standard error that lm-eval reports; None where it reports none."""

    task: str
    metric: str
    value: float
    error: float | None


def is_data(name: str) -> bool:
    """Whether a task's name is a data file's or folder's: names of lm-eval may hold dots and slashes too."""
    return installation.locate(name).exists() or read.kind(Path(name)) in read.READERS


def check_names(tasks: list[str | dict[str, Any]]) -> None:
    """Raise DataError where two tasks have one name: lm-eval would score one of them alone."""
    names = [task if isinstance(task, str) else task["task"] for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        why, help = "a file's task is named by the file, without its suffix", "rename a file, or ask one at a time"
        raise DataError(f"two tasks are called '{twice}'", why=why, help=help)


def local_task(rows: Rows, folder: Path) -> dict[str, Any]:
    """A task of multiple choice out of a set's questions, and its file in `folder`.

    Raises:
        DataError: fewer than four different answers; a question that is more than one text.
    """
    asked = extract_questions(rows)
    if any(len(question.messages) > 1 or question.tools for question in asked):
        raise DataError(
            f"a question of {rows.name} has a system turn, earlier turns or tools",
            why="lm-eval asks a single text",
            help=f"{installation.command('compare')} --data asks such questions in whole",
        )
    answers = list(dict.fromkeys(question.reference for question in asked))
    if len(answers) < CHOICES:
        raise DataError(f"{rows.name} has {len(answers)} different answers", help=f"{CHOICES} or more")
    made, lines = random.Random(SEED), []
    for question in asked:
        others = made.sample([text for text in answers if text != question.reference], CHOICES - 1)
        choices = made.sample([question.reference, *others], CHOICES)
        row = {"question": question.text, "choices": choices, "answer": choices.index(question.reference)}
        lines.append(json.dumps(row) + "\n")
    file = folder / f"{Path(rows.name).stem}.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}",
        "metric_list": metrics,
    }


def evaluate(
    name: str,
    tasks: list[str | dict[str, Any]],
    limit: int | None,
    batch_size: int,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> list[Score]:
    """A model's scores, asked by its chat template where it has one.

    Args:
        base: where an adapter's base lies, in place of where the adapter says.
        trust_remote_code: run the Python code that lies beside the model.

    Raises:
        RunError: lm-eval is not installed, or has no such task.
        ModelError: a task's data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RunError("lm-eval is not installed", help=installation.install_command("lm-eval[hf]", "eval")) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    unknown = [task for task in tasks if isinstance(task, str) and not manager.match_tasks([task])]
    if unknown:
        help = "lm-eval ls tasks lists them; a file of ours: data/techco_eval.jsonl"
        raise RunError(f"lm-eval has no task '{unknown[0]}'", help=help)
    model, tokenizer = pretrained.load_for_inference(name, base, trust_remote_code)
    try:
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            limit=limit,
            apply_chat_template=tokenizer.chat_template is not None,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:
        help = "HF_HOME=DIR, a folder that can be written: the data is copied into its cache"
        if isinstance(error, ConnectionError | FileNotFoundError):  # what `datasets` raises without a hub
            help = "public tasks need a hub; a file of ours does not: --tasks data/techco_eval.jsonl"
        raise ModelError("the data of a task cannot be had", why=first_line(error), help=help) from None
    return [score for task, figures in found["results"].items() for score in _scores(task, figures)]


def _scores(task: str, figures: dict[str, Any]) -> list[Score]:
    """lm-eval's names are `metric,filter` and `metric_stderr,filter`."""
    scores = []
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
            error = figures.get(f"{metric}_stderr,{kind}")
            scores.append(Score(task, metric, float(value), error if isinstance(error, float) else None))
    return scores
