"""What is wrong or odd with rows before anything is trained on them: as text, and as the tokens that they become.

Errors make a set unfit, warnings ask for a look, figures describe.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stepladder import files
from stepladder.data import copies, loss_keys, render
from stepladder.data.file_list import FileList, join, take
from stepladder.data.readers import quote
from stepladder.data.row_renderer import NO_END, Remarks, share_of_rows
from stepladder.data.rows import WIDE, Rows, all_text, role_text, width
from stepladder.data.special_tokens import KEY as NEW_TOKENS
from stepladder.data.special_tokens import NewToken
from stepladder.errors import DataError
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ERROR, WARNING, FIGURE = "error", "warning", "figure"
LANGUAGE_SAMPLE = 2000  # rows
LANGUAGE_SURE = 40  # characters below which a language cannot be told
LONG_ENOUGH = 20  # characters from which a text's tokens per character say something

PRIVATE, ODD = (
    {name: re.compile("|".join(patterns)) for name, patterns in kinds.items()}
    for kinds in files.read_table("data/sensitive_text.yaml").values()
)

NOT_RENDERED, ANSWER_CUT, NOTHING_TRAINED = "not_rendered", "answer_cut", "nothing_trained"
SKIPPED = ": the row is skipped"
UNUSABLE = (NOT_RENDERED, ANSWER_CUT, NOTHING_TRAINED)  # of rows that training stops at, or skips


@dataclass(frozen=True)
class Finding:
    """One observation: the rows it concerns (`where`), and for copies the rows that these are `like`.

    `name` is for programs; `figures` holds numbers (int: counts, characters, tokens; float: shares).
    """

    severity: str
    name: str
    what: str
    where: Sequence[str] = ()
    help: str = ""
    like: Sequence[str] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """The shortest input and output, in characters; a wide one (Chinese, Japanese, Korean) counts as three."""

    input: int = 10
    output: int = 20


def check_texts(found: Rows, limits: Limits, evaluation: Rows | None = None) -> list[Finding]:
    """What rows show as text; with evaluation rows, also whether they are trained on too."""
    return [
        *_too_short(found, limits),
        *_copies(found, evaluation),
        *_suspects(found, PRIVATE, "private", "mask it, or remove the rows: what is trained can be recited"),
        *_suspects(found, ODD, "odd_characters", "repair the text where it comes from"),
        *_lengths(found),
        *_languages(found),
    ]


def _too_short(found: Rows, limits: Limits) -> Iterator[Finding]:
    for role, label, least in (("user", "input", limits.input), ("assistant", "output", limits.output)):
        for example, where in zip(found.examples, found.where, strict=True):
            text = role_text(example, role)
            if (count := width(text)) < least and not (role == "user" and "text" in example):
                wide = f" ({count}, wide ones counted as {WIDE})" * (count != len(text))
                what = f"{label} too short: {quote(text, 40)} has {len(text)} characters{wide}, at least {least}"
                yield Finding(ERROR, f"short_{label}", what, [where], f"write more, or --min_{label} {count}")


def _copies(found: Rows, evaluation: Rows | None) -> Iterator[Finding]:
    """Rows that are (nearly) others, and evaluation rows that are (nearly) trained on."""
    own = len(found)
    apart = evaluation or Rows("", [], [])
    places = join([found.where, apart.where])
    for name, (later, earlier), word in zip(
        ("duplicates", "near_duplicates"),
        copies.find(join([found.examples, apart.examples]), own),
        ("exact", "near"),
        strict=True,
    ):
        inside = bisect.bisect_left(later, own)  # they are in the rows' order
        for label, what, help, these in (
            (name, f"{word} copies of other rows", "remove them, unless they are meant to weigh more", slice(inside)),
            (
                f"eval_{name}",
                f"{word} copies of trained rows in {apart.name}",
                "remove them from one set",
                slice(inside, None),
            ),
        ):
            if many := len(later[these]):
                where, like = take(places, later[these]), take(places, earlier[these])
                yield Finding(WARNING, label, f"{what}: {many:,}", where, help, like)


def _suspects(found: Rows, patterns: dict[str, re.Pattern[str]], name: str, help: str) -> Iterator[Finding]:
    numbers: dict[str, array[int]] = {}
    for number, example in enumerate(found.examples):
        text = all_text(example)
        for kind, pattern in patterns.items():
            if any(_is_meant(kind, match[0]) for match in pattern.finditer(text)):
                numbers.setdefault(kind, array("Q")).append(number)
    for kind, rows in numbers.items():
        what = f"{kind} in {len(rows):,} row{'s' * (len(rows) != 1)}"
        yield Finding(WARNING, name, what, take(found.where, rows), help)


def _is_meant(kind: str, text: str) -> bool:
    """Whether digits can be what they look like: cards have a check digit (Luhn), phone numbers 8 to 15 digits."""
    digits = [int(c) for c in text if c.isdecimal()]
    if kind == "a card number":
        doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
        return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0
    return kind != "a phone number" or 8 <= len(digits) <= 15


def _lengths(found: Rows) -> Iterator[Finding]:
    for label, role in (("input", "user"), ("output", "assistant")):
        lengths = array("Q", (len(role_text(example, role)) for example in found.examples))
        if any(lengths):
            yield Finding(FIGURE, f"{label}_characters", f"{label} characters", figures=spread(lengths))


def _languages(found: Rows) -> Iterator[Finding]:
    """Shares of the languages, of a sample spread over the set. Short texts and numbers tell none."""
    from py3langid import classify

    sample = take(found.examples, range(0, len(found), math.ceil(len(found) / LANGUAGE_SAMPLE)))
    texts = (text for text in map(all_text, sample) if sum(map(str.isalpha, text)) >= LANGUAGE_SURE)
    counts = Counter(classify(text[:1000])[0] for text in texts)
    if total := counts.total():
        shares = {language: round(count / total, 4) for language, count in counts.most_common()}
        yield Finding(FIGURE, "languages", "languages", figures=shares)


def check_tokens(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, prefix: str = "", new: Sequence[NewToken] = ()
) -> list[Finding]:
    """Tokens, masks and cuts of rows; `prefix` stands before the figures' names (`evaluation `), `new` are counted.

    Raises:
        ModelError: conversations and a tokenizer without a chat template.
    """
    max_length = settings.get("max_length")
    train_on, reasoning = loss_keys.mode(settings), loss_keys.reasoning_mode(settings)
    skips = settings.get("on_bad_row") == "skip"
    trained = kept = turns = ended = kept_rows = 0
    lengths, cut = array("Q"), array("Q")
    beheaded = array("Q")  # rows that lose their whole answer
    idle = array("Q")  # rows with nothing to train
    all_known = True  # all lengths: of very long rows only the beginning is tokenized
    findings: list[Finding] = []
    remarks = Remarks(settings.get(NEW_TOKENS) or ())
    count = NewTokenCount(new)
    for number, row in enumerate(render.tokenize(rows, tokenizer, train_on, remarks, max_length, reasoning)):
        if isinstance(row, DataError):
            _add_fault(findings, row, rows.where[number], skips)
            continue
        all_known = all_known and row.is_whole
        lengths.append(len(row.ids))
        left = [label for label in row.labels[:max_length] if label != render.IGNORED]
        count.add(row.ids[:max_length], left)
        trained, kept = trained + len(left), kept + len(row.ids[:max_length])
        if max_length is not None and len(row.ids) > max_length:
            cut.append(number)
        kept_rows += bool(left)
        if not left:  # of a very long row the answer may lie behind the tokens
            is_behind = not row.is_whole and row.turns > 0
            (beheaded if is_behind or any(label != render.IGNORED for label in row.labels) else idle).append(number)
        found = sum(max_length is None or end < max_length for end in row.ends)
        turns, ended, remarks.thoughts = turns + row.turns, ended + found, remarks.thoughts + row.thoughts

    findings += count.findings()
    share = {"share": round(trained / kept, 4) if kept else 0.0, "trained": trained, "of": kept}
    findings += [
        Finding(FIGURE, "tokens_per_row", f"{prefix}tokens per row", figures=spread(lengths or [0])),
        Finding(FIGURE, "trained_tokens", f"{prefix}trained tokens", figures=share),
    ]
    findings += _masked_thoughts(settings, remarks.thoughts, prefix) if reasoning != "all" else []
    if turns:
        counts = {"turns": turns, "trained": ended}
        findings.append(Finding(FIGURE, "end_of_turn", f"{prefix}end-of-turn token", figures=counts))
        if not ended and not prefix and train_on != "everything":  # evaluation rows teach nothing
            findings.append(Finding(ERROR, "no_end_of_turn", NO_END[0], help=NO_END[1]))
    findings += _untrained(rows, beheaded, idle, max_length, skips)
    if skips and len(rows) and not kept_rows:
        findings.append(Finding(ERROR, "no_row_left", f"no row of {rows.name} can be used: all are skipped"))
    if cut:
        what = f"{share_of_rows(cut, len(rows))} are cut by max_length {max_length}"
        help = f"max_length: {max(lengths)} keeps all, at more memory" if all_known else "shorten or split the rows"
        findings.append(Finding(WARNING, "cut", what, take(rows.where, cut), help))
    for name, what, help, numbers in remarks.texts(len(rows)):
        findings.append(Finding(WARNING, name, what, take(rows.where, numbers), help))
    return findings + list(_badly_tokenized(rows, tokenizer))


def _masked_thoughts(settings: Settings, tokens: int, prefix: str) -> Iterator[Finding]:
    """How many tokens of thoughts have no loss by `train_on_reasoning`, and that it changes nothing where none is."""
    yield Finding(FIGURE, "masked_thoughts", f"{prefix}thoughts without a loss", figures={"tokens": tokens})
    for note in [] if prefix else loss_keys.idle_notes(settings, tokens):
        yield Finding(WARNING, "idle_reasoning", note, help="remove train_on_reasoning")


def _untrained(
    rows: Rows, beheaded: Sequence[int], idle: Sequence[int], max_length: int | None, skips: bool
) -> Iterator[Finding]:
    """Rows that lose their whole answer, and rows with nothing to train."""
    bad, skipped = (WARNING, SKIPPED) if skips else (ERROR, "")
    if beheaded:
        what, help = f"max_length {max_length} cuts off the whole answer", "raise max_length, or shorten the row"
        yield Finding(bad, ANSWER_CUT, what + skipped, take(rows.where, beheaded), help)
    if idle:
        what = "nothing of the row is trained"
        yield Finding(bad, NOTHING_TRAINED, what + skipped, take(rows.where, idle), "remove the row")


class NewTokenCount:
    """In how many rows each new token stands, and has a loss."""

    def __init__(self, new: Sequence[NewToken]):
        self.new, self.holds, self.learns = new, Counter[int](), Counter[int]()
        self.numbers = {token.row for token in new}

    def add(self, ids: Sequence[int], trained: Sequence[int]) -> None:
        """Count a row, by all of its tokens and by those that have a loss."""
        if self.numbers:
            self.holds.update(self.numbers.intersection(ids))
            self.learns.update(self.numbers.intersection(trained))

    def findings(self) -> Iterator[Finding]:
        """The counts, and a warning for those that stand in no row."""
        for token in self.new:
            figures = {"rows": self.holds[token.row], "with loss": self.learns[token.row]}
            yield Finding(FIGURE, "new_token", f"new token {token.text}", figures=figures)
        if idle := [token.text for token in self.new if not self.holds[token.row]]:
            what = f"no row holds {', '.join(idle[:10])}{', …' * (len(idle) > 10)}: a new token that learns nothing"
            yield Finding(WARNING, "untrained_token", what, help="rows that hold it, or remove it")


def _add_fault(findings: list[Finding], error: DataError, where: str, skips: bool) -> None:
    """Add a row that cannot be rendered; skipped rows with the same fault share one finding."""
    if not skips:
        what = error.what + f" ({error.why})" * bool(error.why)
        findings.append(Finding(ERROR, NOT_RENDERED, what, [where], error.help))
        return
    what = error.what.partition(": ")[0] + SKIPPED
    if same := next((finding for finding in findings if finding.what == what), None):
        same.where.append(where)  # type: ignore[attr-defined]
    else:
        findings.append(Finding(WARNING, NOT_RENDERED, what, FileList([where]), error.help))


def _badly_tokenized(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Texts with more tokens than characters, and texts with characters that the tokenizer does not know."""
    dense, unknown = array("Q"), array("Q")
    texts = (all_text(example)[: render.LONG] for example in rows.examples)
    numbers = itertools.count()
    while batch := list(render.take_batch(texts)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for text, ids, number in zip(batch, encoded, numbers, strict=False):
            if len(ids) > len(text) >= LONG_ENOUGH:
                dense.append(number)
            if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) and tokenizer.unk_token_id in ids:
                unknown.append(number)
    for name, found, what in (
        ("more_tokens_than_characters", dense, "have more tokens than characters: slow to train and hard to learn"),
        ("unknown_characters", unknown, "hold characters that the tokenizer does not know"),
    ):
        if found:
            help = "a model whose tokenizer knows this script, or other rows"
            yield Finding(WARNING, name, f"{share_of_rows(found, len(rows))} {what}", take(rows.where, found), help)


def spread(values: Iterable[int]) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum, each a value that is there (nearest rank)."""
    ordered = sorted(values)
    median, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return {"min": ordered[0], "median": median, "p95": p95, "max": ordered[-1]}
