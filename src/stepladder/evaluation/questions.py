"""What the models are asked: the data's own questions with their answers as references, or a file of prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder import files
from stepladder.data import formats, read, render
from stepladder.data.columns import Converter, find_question_shape
from stepladder.data.formats import Example
from stepladder.data.rows import Rows, examples
from stepladder.data.source import Source
from stepladder.errors import DataError
from stepladder.evaluation.generate import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_BYTES = 1 << 26  # each prompt is answered by a model
PROOF_PROMPTS, PROOF_TOKENS = 4, 48  # of a merge's proof: prompts, and the last tokens of each that are kept
BUILT_IN = (
    "What should I check before I sign a rental contract?",
    "Write a short poem about rain.",
    "def fibonacci(n):",
    "How far is the Moon?",
)


class Question(NamedTuple):
    """A conversation that ends before an answer; `reference` is empty where there is none to hold the answer to.

    `tools` and `chat_template_kwargs` go to the model's chat template, as in training.
    """

    messages: list[Message]
    reference: str = ""
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return str(self.messages[-1]["content"])

    @property
    def example(self) -> Example:
        """The question as rows of training data have it."""
        example: Example = {"messages": self.messages}
        if self.tools:
            example["tools"] = self.tools
        if self.chat_template_kwargs:
            example["chat_template_kwargs"] = self.chat_template_kwargs
        return example


def of_rows(rows: Rows) -> list[Question]:
    """The last turn of each conversation; rows of plain text ask nothing, nor do answers without a question."""
    talks = (example for example in rows.examples if "messages" in example)
    asked = (_question(*formats.split_answer(example)) for example in talks)
    return [question for question in asked if question.messages and question.reference]


def remarks(asked: list[Question], rows: Rows | None = None) -> list[str]:
    """What a person should know of questions that cannot show everything.

    Args:
        rows: the rows that all of `asked` come from, where they do.
    """
    bare = sum(not question.reference for question in asked)
    if not asked:
        return ["rows of plain text ask nothing: the losses alone are compared"]
    rest = "what needs a reference (chrF, ROUGE-L, exact match, F1, facts) is of the others alone"
    rest = rest if bare < len(asked) else "chrF, ROUGE-L, exact match, F1 and facts are not measured"
    notes = [f"{bare} of {len(asked)} questions have no reference answer: {rest}"] if bare else []
    if rows and len(asked) < len(rows):
        silent = len(rows) - len(asked)
        notes.append(f"{silent} of {len(rows)} rows ask nothing: plain text, or an answer that is a tool call alone")
    return notes


def from_file(path: Path, notes: list[str] | None = None) -> list[Question]:
    """Prompts: a text file of one a line, or rows (JSONL, …) with or without answers, read as training rows are.

    Args:
        notes: columns of the rows that are not used are appended to it.

    Raises:
        DataError: no such file, one without a prompt, a row that holds none.
    """
    if path.suffix == ".txt" and os.path.exists(path):
        try:
            lines = files.read_text(path, PROMPTS_BYTES, errors="replace").splitlines()
        except ValueError as error:
            raise DataError(f"the prompts {path} cannot be read: {error}", help="a text file of one a line") from None
        found = [Question([{"role": "user", "content": line.strip()}]) for line in lines if line.strip()]
    else:
        converter = Converter(str(path), None)
        found = list(_of_file(path, converter))
        if notes is not None:
            notes += [remark.what for remark in converter.remarks()]
    if not found:
        raise DataError(f"{path} holds no prompt", help='one a line, or JSONL rows: {"prompt": "…"}')
    return found


def _of_file(path: Path, converter: Converter) -> Iterator[Question]:
    for where, row in read.read(path):
        if isinstance(row, DataError):
            raise row
        shape = find_question_shape(row, where)
        example, answer = formats.to_prompt(row, where, shape)
        converter.count(row, shape, example)
        yield _question(example, answer)


def _question(example: Example, answer: str) -> Question:
    return Question(example["messages"], answer, example.get("tools"), example.get("chat_template_kwargs"))


def proof_rows(source: Source) -> list[Example]:
    """The first rows of a set, for the proof of a merged model; the rest is not read."""
    return [example for example, _ in islice(examples(source, True, []), PROOF_PROMPTS)]


def built_in_rows() -> list[Example]:
    return [{"messages": [{"role": "user", "content": text}]} for text in BUILT_IN]


def prompt_ids(rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What the model is asked, by the tokenizer's chat template where it has one."""
    found = []
    for row in rows:
        messages = list(row.get("messages", ()))
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages and tokenizer.chat_template:
            text = render.prompt_text({**row, "messages": messages}, tokenizer)
        else:
            text = messages[-1]["content"] if messages else row["text"]
        found.append(tokenizer(text, add_special_tokens=not messages)["input_ids"][-PROOF_TOKENS:])
    return found
