"""The sides of a comparison measured: a model, a server, or a transcript."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from stepladder.data import mixture
from stepladder.data.formats import Example
from stepladder.data.rows import Rows
from stepladder.data.stream import Stream
from stepladder.errors import DataError, ModelError, RecipeError
from stepladder.evaluation import endpoint, generate, loss, transcript
from stepladder.evaluation.compare import Side
from stepladder.evaluation.endpoint import Endpoint
from stepladder.evaluation.questions import Question
from stepladder.model import load
from stepladder.recipe import load as recipe_load
from stepladder.run import RECIPE

SAMPLE = 24  # rows of the training data and of general knowledge that losses are measured on
MOST_TRAINING_ROWS = 50_000  # that are held to find copies of


@dataclass
class Measured:
    """What each side is measured on; `held_out`, `training` and `general` may be missing."""

    questions: list[Question]
    held_out: Rows | None = None
    training: Rows | None = None
    general: Rows | None = None
    notes: list[str] = field(default_factory=list)


def measure(source: str | Endpoint, on: Measured, max_new_tokens: int, template: str | None = None) -> Side:
    """A side's answers to all questions and, where it is a model, its losses.

    Args:
        source: a model's folder or hub id, a transcript (.jsonl), or a server.
        template: the chat template for a model that has none.
    """
    conversations = [question.messages for question in on.questions]
    if isinstance(source, Endpoint):
        return Side(str(source), endpoint.answers(source, conversations, max_new_tokens))
    if is_transcript(source):
        return Side(source, transcript.answers(Path(source), on.questions))
    model, tokenizer = load.for_inference(source)
    if tokenizer.chat_template is None and template:
        tokenizer.chat_template = template
        on.notes.append(f"{source} has no chat template and is asked by the tuned model's")
    if tokenizer.chat_template is None and on.held_out and any("messages" in row for row in on.held_out.examples):
        raise ModelError(
            f"'{source}' has no chat template, so it cannot be asked as the data asks",
            way_out="compare it with a model that was tuned with one (chat_template or prompt_template in its recipe)",
        )
    side = Side(source, generate.answers(model, tokenizer, conversations, max_new_tokens=max_new_tokens))
    for name, rows in (("losses", on.held_out), ("training", on.training), ("general", on.general)):
        if rows:
            setattr(side, name, loss.of_rows(model, tokenizer, rows))
    return side


def check(source: str | Endpoint, on: Measured) -> None:
    """Look whether a side is there, before anything slow begins.

    Raises:
        ModelError, DataError: it is not, or a transcript lacks a question.
    """
    if isinstance(source, str):
        if is_transcript(source):
            transcript.answers(Path(source), on.questions)
        else:
            load.check_source(source)


def template_of(tuned: list[str]) -> str | None:
    """The chat template of the first tuned model that has one."""
    return next((found for name in tuned if (found := load.tokenizer_of(name).chat_template)), None)


def is_transcript(source: str) -> bool:
    return source.endswith(".jsonl")


def training_rows(tuned: str, notes: list[str]) -> Rows | None:
    """The rows that a run was trained on, by its resolved recipe; None where that cannot be told, with a note."""
    file = Path(tuned) / RECIPE
    if not file.is_file():
        notes.append(f"{tuned} is no run folder: what it was trained on is not known, nor whether it knows it by heart")
        return None
    try:
        rows, _ = mixture.load(recipe_load.load(str(file), []))
    except (DataError, RecipeError) as error:
        notes.append(f"the training data of {tuned} cannot be read again: {error.what}")
        return None
    if isinstance(rows, Stream):
        pairs = list(islice(rows.read(0), MOST_TRAINING_ROWS))
        return Rows(rows.name, [example for example, _ in pairs], [where for _, where in pairs])
    return rows.take(range(min(len(rows), MOST_TRAINING_ROWS)))


def sample(rows: Rows, without: Rows | None = None, seed: int = 42) -> Rows | None:
    """A few rows drawn by the seed, none of them among `without`; None where none is left."""
    known = {_key(example) for example in without.examples} if without else set()
    free = [i for i, example in enumerate(rows.examples) if _key(example) not in known]
    return rows.take(sorted(random.Random(seed).sample(free, min(SAMPLE, len(free))))) if free else None


def answers_of(rows: Rows) -> list[str]:
    """What a model learns to say from rows: the assistant's turns, or the whole text."""
    return [text for example in rows.examples for text in _said(example)]


def _said(example: Example) -> list[str]:
    if "text" in example:
        return [example["text"]]
    return [str(turn["content"]) for turn in example["messages"] if turn["role"] == "assistant" and turn["content"]]


def _key(example: Example) -> str:
    return repr(example.get("text") or [turn["content"] for turn in example["messages"]])
