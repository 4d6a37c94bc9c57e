"""What rows become for the model: how many tokens, which of them are trained, what max_length takes away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stepladder.data import render
from stepladder.data.audit import ERROR, FIGURE, WARNING, Finding, spread
from stepladder.data.remarks import NO_END, Remarks, share_of_rows
from stepladder.data.rows import Rows, all_text
from stepladder.errors import DataError
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_RENDERED, ANSWER_CUT, NOTHING_TRAINED = "not_rendered", "answer_cut", "nothing_trained"
SKIPPED = ": the row is skipped"
UNUSABLE = (NOT_RENDERED, ANSWER_CUT, NOTHING_TRAINED)  # of rows that training stops at, or skips
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
        ModelError: conversations and a tokenizer without a chat template.
    """
    max_length, train_on = settings.get("max_length"), render.mode(settings)
    skips = settings.get("on_bad_row") == "skip"
    bad, skipped = (WARNING, SKIPPED) if skips else (ERROR, "")
    lengths, trained, kept, turns, ended, kept_rows = [0], 0, 0, 0, 0, 0
    cut: list[str] = []
    beheaded: list[str] = []  # rows that lose their whole answer
    idle: list[str] = []  # rows with nothing to train
    findings: list[Finding] = []
    remarks = Remarks()
    rendered = render.tokenize(rows, tokenizer, train_on, remarks)
    for where, row in zip(rows.where, rendered, strict=True):
        if isinstance(row, DataError):
            _add_fault(findings, row, where, skips)
            continue
        lengths.append(len(row.ids))
        left = [label for label in row.labels[:max_length] if label != render.IGNORED]
        trained, kept = trained + len(left), kept + len(row.ids[:max_length])
        is_cut = max_length is not None and len(row.ids) > max_length
        if is_cut:
            cut.append(where)
        kept_rows += bool(left)
        if not left:
            (beheaded if any(label != render.IGNORED for label in row.labels) else idle).append(where)
        found = sum(max_length is None or end < max_length for end in row.ends)
        turns, ended = turns + row.turns, ended + found

    lengths = lengths[1:] or lengths
    share = round(trained / kept, 4) if kept else 0.0
    findings += [
        Finding(FIGURE, "tokens_per_row", f"{of}tokens per row", figures=spread(lengths)),
        Finding(
            FIGURE, "trained_tokens", f"{of}trained tokens", figures={"share": share, "trained": trained, "of": kept}
        ),
    ]
    if turns:
        figures = {"turns": turns, "trained": ended}
        findings.append(Finding(FIGURE, "end_of_turn", f"{of}end-of-turn token", figures=figures))
        if not ended and not of and train_on != "everything":  # evaluation rows teach nothing
            findings.append(Finding(ERROR, "no_end_of_turn", NO_END[0], help=NO_END[1]))
    if beheaded:
        what, help = f"max_length {max_length} cuts off the whole answer", "raise max_length, or shorten the row"
        findings.append(Finding(bad, ANSWER_CUT, what + skipped, beheaded, help))
    if idle:
        what = "nothing of the row is trained"
        findings.append(Finding(bad, NOTHING_TRAINED, what + skipped, idle, "remove the row"))
    if skips and len(rows) and not kept_rows:
        findings.append(Finding(ERROR, "no_row_left", f"no row of {rows.name} can be used: all are skipped"))
    if cut:
        what = f"{share_of_rows(cut, len(rows))} are cut by max_length {max_length}"
        findings.append(Finding(WARNING, "cut", what, cut, f"max_length: {max(lengths)} keeps all, at more memory"))
    for name, what, help, places in remarks.texts(len(rows)):
        findings.append(Finding(WARNING, name, what, places, help))
    return findings + list(_badly_tokenized(rows, tokenizer))


def _add_fault(findings: list[Finding], error: DataError, where: str, skips: bool) -> None:
    """Add a row that cannot be rendered; skipped rows with the same fault share one finding."""
    if not skips:
        what = error.what + f" ({error.why})" * bool(error.why)
        findings.append(Finding(ERROR, NOT_RENDERED, what, [where], error.help))
        return
    what = error.what.partition(": ")[0] + SKIPPED
    if same := next((finding for finding in findings if finding.what == what), None):
        same.where.append(where)
    else:
        findings.append(Finding(WARNING, NOT_RENDERED, what, [where], error.help))


def seen(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, count: int) -> Iterator[Seen]:
    """The first rows as the model sees them."""
    max_length = settings.get("max_length")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = rows.take(range(min(count, len(rows))))
    for where, row in zip(first.where, render.tokenize(first, tokenizer, render.mode(settings)), strict=True):
        if isinstance(row, DataError):  # among the findings
            continue
        cut = 0 if max_length is None else max(0, len(row.ids) - max_length)
        ids, labels = row.ids[:max_length], row.labels[:max_length]
        kinds = [(label != render.IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
        stretches, end, before = [], 0, ""
        for (trained, is_special), group in itertools.groupby(kinds):
            end += len(list(group))
            # The text up to here less the text before: some tokenizers drop a blank where decoding begins.
            text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            stretches.append(Stretch(text[len(before) :], trained, is_special))
            before = text
        yield Seen(where, len(ids), sum(trained for trained, _ in kinds), cut, stretches)


def _badly_tokenized(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Texts with more tokens than characters, and texts with characters that the tokenizer does not know."""
    dense: list[str] = []
    unknown: list[str] = []
    for start in range(0, len(rows), render.BATCH):
        texts = [all_text(example) for example in rows.examples[start : start + render.BATCH]]
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
            help = "a model whose tokenizer knows this script, or other rows"
            yield Finding(WARNING, name, f"{share_of_rows(places, len(rows))} {what}", places, help)
