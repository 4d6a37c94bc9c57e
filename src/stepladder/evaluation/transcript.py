"""Answers kept in a file, by `generate.py --transcript`: a side of a comparison that needs no model any more."""

from __future__ import annotations

import json
from pathlib import Path

from stepladder.data import read
from stepladder.errors import DataError
from stepladder.evaluation.generate import Answer, Message
from stepladder.evaluation.questions import Question


def row(model: str, messages: list[Message], answer: Answer) -> str:
    """A line of a transcript: a conversation with its answer, as training data has it, and whose it is."""
    said = [*messages, {"role": "assistant", "content": answer.text}]
    return json.dumps({"model": model, "stopped": answer.stopped, "messages": said}, ensure_ascii=False) + "\n"


def answers(path: Path, questions: list[Question]) -> list[Answer]:
    """The answers of a transcript to these questions; a question is found by its text.

    Raises:
        DataError: no such file, a row that is no transcript's, a question that it does not answer.
    """
    known: dict[str, Answer] = {}
    for where, found in read.read(path):
        if isinstance(found, DataError):
            raise found
        try:
            *_, asked, said = found["messages"]
            known[asked["content"]] = Answer(str(said["content"]), bool(found["stopped"]))
        except (KeyError, TypeError, ValueError):
            way_out = "generate.py --prompts FILE --transcript FILE.jsonl writes one"
            raise DataError("this row is of no transcript", where=where, way_out=way_out) from None
    missing = [question.text for question in questions if question.text not in known]
    if missing:
        raise DataError(
            f"{path} answers {len(questions) - len(missing)} of {len(questions)} questions",
            why=f"the first without an answer: {missing[0][:80]!r}",
            way_out="generate.py --prompts with the same file, or --limit with as many questions as it answers",
        )
    return [known[question.text] for question in questions]
