"""What the models are asked: the data's own questions with their answers as references, or a file of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stepladder.data import formats, read
from stepladder.data.rows import Rows
from stepladder.errors import DataError
from stepladder.evaluation.generate import Message

PROMPT_COLUMNS = ("prompt", "question", "input", "instruction", "text")


class Question(NamedTuple):
    """A conversation that ends with the user's turn; `reference` is empty where there is no answer to hold it to."""

    messages: list[Message]
    reference: str = ""

    @property
    def text(self) -> str:
        return str(self.messages[-1]["content"])


def of_rows(rows: Rows) -> list[Question]:
    """The last turn of each conversation; rows of plain text ask nothing."""
    asked = (_of_messages(example["messages"]) for example in rows.examples if "messages" in example)
    return [question for question in asked if question.reference]


def remarks(asked: list[Question]) -> list[str]:
    """What a person should know of questions that cannot show everything."""
    bare = sum(not question.reference for question in asked)
    if not asked:
        return ["rows of plain text ask nothing: the losses alone are compared"]
    rest = "what needs a reference (chrF, ROUGE-L, exact match, F1, facts) is of the others alone"
    rest = rest if bare < len(asked) else "chrF, ROUGE-L, exact match, F1 and facts are not measured"
    return [f"{bare} of {len(asked)} questions have no reference answer: {rest}"] if bare else []


def from_file(path: Path) -> list[Question]:
    """Prompts: a text file of one a line, or rows (JSONL, …) with or without answers.

    Raises:
        DataError: no such file, one without a prompt, a row that holds none.
    """
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [Question([{"role": "user", "content": line.strip()}]) for line in lines if line.strip()]
    else:
        found = list(_of_file(path))
    if not found:
        raise DataError(f"{path} holds no prompt", way_out='one a line, or JSONL rows: {"prompt": "…"}')
    return found


def _of_file(path: Path) -> Iterator[Question]:
    for where, row in read.read(path):
        if isinstance(row, DataError):
            raise row
        messages = row.get("messages")
        column = next((name for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), None)
        if isinstance(messages, list) and messages and messages[-1].get("role") == "user":
            yield Question(messages)
        elif messages is None and column and not any(row.get(name) for name in formats.ANSWERS):
            yield Question([{"role": "user", "content": row[column]}])
        else:
            example = formats.to_example(row, where, formats.shape_of(row, where))
            if "messages" not in example:
                raise DataError("this row holds no prompt", where=where, way_out='{"prompt": "…"}')
            yield _of_messages(example["messages"])


def _of_messages(messages: list[Message]) -> Question:
    if messages[-1]["role"] != "assistant":
        return Question(messages)
    return Question(messages[:-1], str(messages[-1]["content"] or ""))
