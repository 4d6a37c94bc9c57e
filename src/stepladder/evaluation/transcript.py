"""Answers kept in a file, by `generate.py --transcript`: a side of a comparison that needs no model any more."""

from __future__ import annotations

import json
from pathlib import Path

from stepladder.data import read
from stepladder.data.formats import Example
from stepladder.errors import DataError
from stepladder.evaluation.generate import Answer
from stepladder.evaluation.questions import Question


def row(model: str, asked: Example, answer: Answer, max_new_tokens: int, temperature: float) -> str:
    """A line of a transcript: a conversation with its answer, as training data has it, whose it is, and how made."""
    made = {"model": model, "max_new_tokens": max_new_tokens, "temperature": temperature, "stopped": answer.stopped}
    said = [*asked["messages"], {"role": "assistant", "content": answer.text}]
    return json.dumps(made | asked | {"messages": said}, ensure_ascii=False) + "\n"


def conditions(path: Path) -> tuple[int | None, float]:
    """Within how many new tokens a transcript's answers were made (None: it does not say), and how warm.

    Raises:
        DataError: no such file, or rows made under several conditions.
    """
    found = {(row.get("max_new_tokens"), row.get("temperature", 0.0)) for _, row in read.read(path)
             if isinstance(row, dict)}  # fmt: skip
    if len(found) > 1:
        raise DataError(f"the rows of {path} differ in max_new_tokens or temperature", help="keep them anew, alike")
    return found.pop() if found else (None, 0.0)


def answers(path: Path, questions: list[Question]) -> list[Answer]:
    """The answers of a transcript to these questions; a question is found by its whole conversation and its tools.

    Raises:
        DataError: no such file, a row that is no transcript's, a question that it does not answer.
    """
    known: dict[str, Answer] = {}
    texts = set()
    for where, found in read.read(path):
        if isinstance(found, DataError):
            raise found
        try:
            *before, said = found["messages"]
            known[_key(found | {"messages": before})] = Answer(str(said["content"]), bool(found["stopped"]))
            texts.add(before[-1]["content"])
        except (KeyError, IndexError, TypeError, ValueError):
            help = "generate.py --prompts FILE --transcript FILE.jsonl writes one"
            raise DataError("this row is of no transcript", where=where, help=help) from None
    missing = [question.text for question in questions if _key(question.example) not in known]
    if missing:
        other = "; that text is answered in another conversation (a system prompt, tools, or turns before it)"
        raise DataError(
            f"{path} answers {len(questions) - len(missing)} of {len(questions)} questions",
            why=f"the first without an answer: {missing[0][:80]!r}" + other * (missing[0] in texts),
            help="generate.py --prompts with the same file, or --limit with as many questions as it answers",
        )
    return [known[_key(question.example)] for question in questions]


def _key(asked: Example) -> str:
    return json.dumps([asked.get(key) for key in ("messages", "tools", "chat_template_kwargs")], sort_keys=True)
