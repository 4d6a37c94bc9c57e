"""What rows become for the model: how many tokens, which of them are trained, what max_length takes away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stepladder.data import render
from stepladder.data.audit import ERROR, FIGURE, WARNING, Finding, everything, spread
from stepladder.data.rows import Rows
from stepladder.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LONG_ENOUGH = 20  # characters from which a text's tokens per character say something


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind, as text."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Seen:
    """A row as the model sees it: its tokens, how many are trained, and how many max_length cuts off."""

    where: str
    tokens: int
    trained: int
    cut: int
    stretches: list[Stretch]


def check(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, of: str = "") -> list[Finding]:
    """Tokens, masks and cuts of rows; `of` stands before the figures' names (`evaluation `).

    Raises:
        DataError: the template refuses a conversation.
        ModelError: conversations and a tokenizer without a chat template.
    """
    max_length, train_on = settings.get("max_length"), render.mode(settings)
    lengths, trained, kept, turns, ended = [], 0, 0, 0, 0
    cut: list[str] = []
    beheaded: list[str] = []  # rows that lose their whole answer
    idle: list[str] = []  # rows with nothing to train
    endless: list[str] = []  # rows with a turn that ends without the token
    stops = render.end_of_turn(tokenizer)
    rendered = render.tokenize(rows, tokenizer, train_on)
    for example, where, (ids, labels) in zip(rows.examples, rows.where, rendered, strict=True):
        lengths.append(len(ids))
        left = [label for label in labels[:max_length] if label != render.IGNORED]
        trained, kept = trained + len(left), kept + len(ids[:max_length])
        is_cut = max_length is not None and len(ids) > max_length
        if is_cut:
            cut.append(where)
        if not left:
            (beheaded if any(label != render.IGNORED for label in labels) else idle).append(where)
        if "messages" in example:
            answers = sum(message["role"] == "assistant" for message in example["messages"])
            wanted = min(answers, 1) if train_on == "last_turn" else answers
            found = min(wanted, sum(label in stops for label in left))
            turns, ended = turns + wanted, ended + found
            if found < wanted and not is_cut:
                endless.append(where)

    findings = [
        Finding(FIGURE, "tokens_per_row", f"{of}tokens per row", figures=spread(lengths)),
        Finding(
            FIGURE,
            "trained_tokens",
            f"{of}trained tokens",
            figures={"share": round(trained / kept, 4), "trained": trained, "of": kept},
        ),
    ]
    if turns:
        figures = {"turns": turns, "trained": ended}
        findings.append(Finding(FIGURE, "end_of_turn", f"{of}end-of-turn token", figures=figures))
        if not ended and not of:  # evaluation rows teach nothing
            findings.append(_no_end())
    if beheaded:
        what, way_out = f"max_length {max_length} cuts off the whole answer", "raise max_length, or shorten the row"
        findings.append(Finding(ERROR, "answer_cut", what, beheaded, way_out))
    if idle:
        findings.append(Finding(ERROR, "nothing_trained", "nothing of the row is trained", idle, "remove the row"))
    if cut:
        what = f"{_share(cut, rows)} are cut by max_length {max_length}"
        findings.append(Finding(WARNING, "cut", what, cut, f"max_length: {max(lengths)} keeps all, at more memory"))
    if endless and ended:
        what = f"{_share(endless, rows)} have a turn without an end-of-turn token"
        findings.append(Finding(WARNING, "turn_without_end", what, endless, "look at them with --show"))
    return findings + list(_badly_tokenized(rows, tokenizer))


def check_ends(dataset: Dataset, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Whether rendered conversations train an end of turn at all: else the model never learns to stop.

    For training itself: it looks no further than the first end that it finds.
    """
    stops = render.end_of_turn(tokenizer)
    talks = any("messages" in example for example in rows.examples)
    if talks and all(stops.isdisjoint(labels) for labels in dataset["labels"]):
        return [_no_end()]
    return []


def seen(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, count: int) -> Iterator[Seen]:
    """The first rows as the model sees them."""
    max_length = settings.get("max_length")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = rows.take(range(min(count, len(rows))))
    for where, (ids, labels) in zip(first.where, render.tokenize(first, tokenizer, render.mode(settings)), strict=True):
        cut = 0 if max_length is None else max(0, len(ids) - max_length)
        ids, labels = ids[:max_length], labels[:max_length]
        kinds = [(label != render.IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
        stretches, end, before = [], 0, ""
        for (trained, is_special), group in itertools.groupby(kinds):
            end += len(list(group))
            # The text up to here less the text before: some tokenizers drop a blank where decoding begins.
            text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            stretches.append(Stretch(text[len(before) :], trained, is_special))
            before = text
        yield Seen(where, len(ids), sum(trained for trained, _ in kinds), cut, stretches)


def _no_end() -> Finding:
    return Finding(
        ERROR,
        "no_end_of_turn",
        "the end-of-turn token is trained in no turn, so the model would not learn to stop",
        way_out="raise max_length where it cuts every answer; else use a chat template that ends the answer",
    )


def _badly_tokenized(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Texts with more tokens than characters, and texts with characters that the tokenizer does not know."""
    dense: list[str] = []
    unknown: list[str] = []
    for start in range(0, len(rows), render.BATCH):
        texts = [everything(example) for example in rows.examples[start : start + render.BATCH]]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for text, ids, where in zip(texts, encoded, rows.where[start:], strict=False):
            if len(ids) > len(text) >= LONG_ENOUGH:
                dense.append(where)
            if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) and tokenizer.unk_token_id in ids:
                unknown.append(where)
    for name, places, what in (
        ("more_tokens_than_characters", dense, "have more tokens than characters: slow to train and hard to learn"),
        ("unknown_characters", unknown, "hold characters that the tokenizer does not know"),
    ):
        if places:
            way_out = "a model whose tokenizer knows this script, or other rows"
            yield Finding(WARNING, name, f"{_share(places, rows)} {what}", places, way_out)


def _share(where: list[str], rows: Rows) -> str:
    return f"{len(where):,} of {len(rows):,} rows ({len(where) / len(rows):.1%})"
