"""What the models are asked, and their answers: the data's own questions, a file of prompts, a transcript."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder import files, installation
from stepladder.data import formats, read, render
from stepladder.data.columns import Converter, find_question_shape
from stepladder.data.formats import Example
from stepladder.data.rows import Rows, examples
from stepladder.data.source import Source
from stepladder.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
PROMPTS_BYTES = 1 << 26  # each prompt is answered by a model
PROOF_PROMPTS, PROOF_TOKENS = 4, 48  # of a merge's proof: prompts, and the last tokens of each that are kept
BUILT_IN = (
    "What should I check before I sign a rental contract?",
    "Write a short poem about rain.",
    "def fibonacci(n):",
    "How far is the Moon?",
)


class Answer(NamedTuple):
    """What a model said; `stopped`: it ended by itself, within the tokens that it was allowed."""

    text: str
    stopped: bool


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


def extract_questions(rows: Rows) -> list[Question]:
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


def read_prompts(path: Path, notes: list[str] | None = None) -> list[Question]:
    """Prompts: a text file of one a line, or rows (JSONL, …) with or without answers, read as training rows are.

    Args:
        notes: columns of the rows that are not used are appended to it.

    Raises:
        DataError: no such file, one without a prompt, a row that holds none.
    """
    path = installation.locate(path)
    if path.suffix == ".txt" and os.path.exists(path):
        try:
            lines = files.read_text(path, PROMPTS_BYTES, errors="replace").splitlines()
        except ValueError as error:
            raise DataError(f"the prompts {path} cannot be read: {error}", help="a text file of one a line") from None
        found = [Question([{"role": "user", "content": line.strip()}]) for line in lines if line.strip()]
    else:
        converter = Converter(str(path), None)
        found = []
        for where, row in read.read(path):
            if isinstance(row, DataError):
                raise row
            shape = find_question_shape(row, where)
            example, answer = formats.to_prompt(row, where, shape)
            converter.count(row, shape, example)
            found.append(_question(example, answer))
        if notes is not None:
            notes += [remark.what for remark in converter.remarks()]
    if not found:
        raise DataError(f"{path} holds no prompt", help='one a line, or JSONL rows: {"prompt": "…"}')
    return found


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


def transcript_row(model: str, asked: Example, answer: Answer, max_new_tokens: int, temperature: float) -> str:
    """A line of a transcript (`generate.py --transcript`): a training row, with the model and how it was sampled."""
    made = {"model": model, "max_new_tokens": max_new_tokens, "temperature": temperature, "stopped": answer.stopped}
    said = [*asked["messages"], {"role": "assistant", "content": answer.text}]
    return json.dumps(made | asked | {"messages": said}, ensure_ascii=False) + "\n"


def transcript_conditions(path: Path) -> tuple[int | None, float]:
    """A transcript's limit of new tokens per answer (None: it does not say), and its sampling temperature.

    Raises:
        DataError: no such file, or rows made under several conditions.
    """
    found = {(row.get("max_new_tokens"), row.get("temperature", 0.0)) for _, row in read.read(path)
             if isinstance(row, dict)}  # fmt: skip
    if len(found) > 1:
        raise DataError(
            f"the rows of {path} differ in max_new_tokens or temperature", help="write them again with equal values"
        )
    return found.pop() if found else (None, 0.0)


def transcript_answers(path: Path, questions: list[Question]) -> list[Answer]:
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
            help = f"{installation.command('generate')} --prompts FILE --transcript FILE.jsonl writes one"
            raise DataError("this row is of no transcript", where=where, help=help) from None
    missing = [question.text for question in questions if _key(question.example) not in known]
    if missing:
        other = "; that text is answered in another conversation (a system prompt, tools, or turns before it)"
        raise DataError(
            f"{path} answers {len(questions) - len(missing)} of {len(questions)} questions",
            why=f"the first without an answer: {missing[0][:80]!r}" + other * (missing[0] in texts),
            help=f"{installation.command('generate')} --prompts with the same file, "
            "or --limit with as many questions as it answers",
        )
    return [known[_key(question.example)] for question in questions]


def _key(asked: Example) -> str:
    return json.dumps([asked.get(key) for key in ("messages", "tools", "chat_template_kwargs")], sort_keys=True)
