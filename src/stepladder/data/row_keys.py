"""held_out.json in a run folder: which rows a run was trained on and which it held out, known by their content."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import files, run
from stepladder.data.conversation import REASONING
from stepladder.data.formats import Example
from stepladder.data.rows import Rows
from stepladder.data.stream import Stream

FILE = "held_out.json"
MOST_TRAINED = 100_000  # trained rows whose keys the file holds, in 1.5 MB; of more, their data is read again
MOST_HELD_OUT = 10_000  # held-out rows whose keys and places it holds: the first of them
LONG_ANSWER = 40  # characters, wide ones counted as WIDE
WIDE = 3  # characters that a wide one (Chinese, Japanese, Korean) counts as: about as much as it says


@dataclass(frozen=True)
class Kept:
    """What the file holds: keys and places of the held-out rows, and the keys of all trained rows.

    `rows` are all that were held out, more than `held_out` where they are very many. `trained` is None where
    the file does not hold the keys: a stream, or too many rows. `foreign` names the evaluation set where it came
    with other training data.
    """

    name: str
    rows: int
    held_out: list[str]
    where: list[str]
    foreign: str
    trained: set[str] | None


def role_text(example: Example, *roles: str) -> str:
    """What these roles say in an example, reasoning and tool calls included; a plain text is the assistant's."""
    if "text" in example:
        return str(example["text"]) if "assistant" in roles else ""
    texts = []
    for message in example["messages"]:
        if message["role"] in roles:
            reasoning = "".join(f"{message[key]}\n" for key in REASONING if key in message)
            calls = message.get("tool_calls")
            texts.append(reasoning + message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else ""))
    return "\n".join(texts)


def all_text(example: Example) -> str:
    return role_text(example, "system", "developer", "user", "tool", "assistant")


def width(text: str) -> int:
    """Characters, each wide one counted as `WIDE`."""
    if text.isascii():
        return len(text)
    return len(text) + (WIDE - 1) * sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def normal_text(example: Example) -> str:
    """All that a row gives to the model, case and blanks apart."""
    beside = [example.get(key) for key in ("tools", "chat_template_kwargs")]
    return _plain(all_text(example)) + (json.dumps(beside, sort_keys=True) if any(beside) else "")


def own_text(example: Example) -> str:
    """What a row says of its own: many rows share one system prompt, and are no copies for that."""
    return _plain(role_text(example, "user", "tool", "assistant"))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def key(example: Example) -> str:
    """What a row is known by: the start of a SHA-256 of its text, case and blanks apart (48 bits, hexadecimal).

    Of a row with a long answer these are the words of user, tool and assistant, so that another system prompt
    makes no other row of it; of any other it is all that the model is given.
    """
    has_long_answer = width(role_text(example, "assistant")) >= LONG_ANSWER
    text = own_text(example) if has_long_answer else normal_text(example)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def keys(examples: Iterable[Example]) -> set[str]:
    return {key(example) for example in examples}


def keep(record: run.Run, train: Rows | Stream | None, evaluation: Rows | None, foreign: str) -> list[str]:
    """Write held_out.json and, in run.json, how many rows were held out; called by each rank, done by the writer.

    A run that is resumed with other training rows (`--allow_change`) was trained on both: the keys are added.

    Args:
        foreign: the evaluation set, where it came with other training data (`Recipe.foreign_evaluation`).

    Returns:
        What a person should know: evaluation rows that are trained on too, a file that cannot be written.
    """
    if not record.is_writer:
        return []
    is_needed = isinstance(train, Rows) and (evaluation or len(train) <= MOST_TRAINED)  # 20 s of a million rows
    trained = keys(train.examples) if isinstance(train, Rows) and is_needed else None
    held_out = [key(example) for example in evaluation.examples] if evaluation else []
    count = sum(one in trained for one in held_out) if trained is not None else None
    known = trained if trained is not None and len(trained) <= MOST_TRAINED else None
    if record.manifest["resumed"] and known is not None:
        before = read(record.folder)
        known = known | before.trained if before and before.trained is not None else None
    content = {
        "name": evaluation.name if evaluation else "",
        "rows": len(held_out),
        "held_out": held_out[:MOST_HELD_OUT],
        "where": evaluation.where[:MOST_HELD_OUT] if evaluation else [],
        "foreign": foreign,
        "trained": None if known is None else sorted(known),
    }
    record.update(held_out={"rows": len(held_out), "trained_on": count, "foreign": foreign})
    notes = []
    if held_out and count is None:
        notes.append("whether evaluation rows are trained on too is not known of a stream; compare.py looks for them")
    if count:
        notes.append(
            f"⚠ {count:,} of the {len(held_out):,} evaluation rows are trained on too: what is measured on them is "
            "not held out; check.py --audit names them"
        )
    try:
        files.write_whole(record.folder / FILE, json.dumps(content) + "\n")
    except OSError as error:
        notes.append(f"⚠ {FILE} cannot be written ({error.strerror}): compare.py will read the data again instead")
    return notes


def read(folder: Path) -> Kept | None:
    """The record of a run folder; None where it is missing or damaged."""
    try:
        found: dict[str, Any] = files.read_object(folder / FILE)
        kept = Kept(**{name: found[name] for name in Kept.__dataclass_fields__ if name != "trained"},
                    trained=None if found["trained"] is None else {*found["trained"]})  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None
    named = isinstance(kept.name, str) and isinstance(kept.foreign, str)
    lists = (kept.held_out, kept.where, list(kept.trained or ()))
    texts = all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in lists)
    fits = isinstance(kept.rows, int) and len(kept.held_out) == len(kept.where) and bool(kept.rows) == bool(kept.where)
    return kept if named and texts and fits else None
