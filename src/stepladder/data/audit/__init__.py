"""What is wrong or odd with rows before anything is trained on them: as text, without a tokenizer.

Errors make a set unfit, warnings ask for a look, figures describe. What the rows become as
tokens is the subject of token_checks; printing, of printout.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stepladder.data import columns, mixture
from stepladder.data.formats import Example
from stepladder.data.readers import quote
from stepladder.data.rows import WIDE, Rows, Stream, all_text, normal_text, own_text, role_text, width
from stepladder.data.source import HEAD, Source
from stepladder.errors import DataError
from stepladder.settings import Settings

ERROR, WARNING, FIGURE = "error", "warning", "figure"
STREAMED = 10_000  # rows of a stream that are looked at
CLASS_COLUMNS = ("category", "label", "class", "topic", "intent")
MOST_CLASSES = 50  # more values than that are no classes
IMBALANCE = 10  # how many times more frequent the commonest class may be than the rarest
LANGUAGE_SAMPLE = 2000  # rows
LANGUAGE_SURE = 40  # characters below which a language cannot be told

# Near-duplicates: Jaccard similarity of the texts' 5-character pieces. 18 bands of 7 find 98.5 % of
# the pairs at 0.8 as candidates; each candidate is then compared exactly.
NEAR, PIECE, PERMUTATIONS, BANDS, CANDIDATES = 0.8, 5, 126, 18, 50

# Secrets and personal data. The patterns find look-alikes too. All are bounded: a text takes time in proportion
# to its length.
E_MAIL, SECRET, PRIVATE_KEY = "an e-mail address", "a key or password", "a private key"
CARD, PHONE = "a card number", "a phone number"

PRIVATE = {
    # Names under the reserved domains (example.com, .test) are nobody's.
    E_MAIL: re.compile(r"\b[\w.+-]{1,64}@(?!example\.)(?:[\w-]+\.)+(?!example\b|test\b|invalid\b)[a-zA-Z]{2,}\b"),
    SECRET: re.compile(
        r"\b(?:sk-[\w-]{20,}|sk_(?:live|test)_\w{16,}|gh[pousr]_\w{36}|github_pat_\w{22,}|glpat-[\w-]{20}"
        r"|hf_[A-Za-z]{30,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}"
        r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
        # a name and a value of letters and digits: `client_secret = 'f3k29dk20…'`
        r"|(?i:(?<![a-z])(?:api[_-]?key|secret|access[_-]?token|password)[\w-]{0,20}[\"']?\s{0,3}[:=]\s{0,3}[\"']?"
        r"(?=\S{0,40}\d)(?=\S{0,40}[a-z])[\w/+.=-]{12,100})"
    ),
    PRIVATE_KEY: re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"),
    CARD: re.compile(r"(?<![\d.])[3-6]\d{3}(?:[ -]?\d){9,15}(?!\d)"),
    PHONE: re.compile(
        r"(?<![\w+])\+\d{1,3}(?:[ ./-]?\(?\d{1,4}\)?){2,5}(?!\d)"
        r"|(?<![\d.-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[.-]\d{4}(?![\d-])"
    ),
}
# Characters that no writer meant.
ODD = {
    "replacement characters (�), left by an earlier wrong decoding,": re.compile("\ufffd"),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "invisible characters": re.compile(r"[\u200b\u2060\u202a-\u202e\u2066-\u2069\ufeff]"),
    "UTF-8 that was read as Latin-1 (Ã©, â€™)": re.compile(r"[ÂÃ][\x80-\xbf\u0152-\u0178\u2018-\u2122]|â€|ðŸ"),
}


@dataclass(frozen=True)
class Finding:
    """One observation: the rows it concerns (`where`), and for copies the rows that these are `like`.

    `name` is for programs; `figures` holds numbers (int: counts, characters, tokens; float: shares).
    """

    severity: str
    name: str
    what: str
    where: list[str] = field(default_factory=list)
    help: str = ""
    like: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """The shortest input and output, in characters; a wide one (Chinese, Japanese, Korean) counts as three."""

    input: int = 10
    output: int = 20


@dataclass
class Audit:
    """A set's name, its rows (None where a recipe's cannot be used), and what was found."""

    name: str
    train: Rows | None
    evaluation: Rows | None
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == ERROR]


def stop_on_errors(findings: Iterable[Finding]) -> None:
    """Raise the first error as DataError, with the number of others."""
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        first, others = errors[0], len(errors) - 1
        why = f"rows: {', '.join(first.where[:5])}{', …' * (len(first.where) > 5)}" if first.where else ""
        more = f"{others} more errors: scripts/check.py --recipe … --audit lists them"
        raise DataError(first.what, why="; ".join([why] * bool(why) + [more] * bool(others)), help=first.help)


def of_name(name: str, limits: Limits) -> Audit:
    """A file, folder or hub data set by itself.

    Raises:
        DataError: it cannot be read at all.
    """
    found, findings = read(Source(name))
    return Audit(name, found, None, findings + (check(found, limits) if found else []))


def of_recipe(settings: Settings, limits: Limits) -> Audit:
    """What a recipe trains and evaluates on. Bad rows are all listed, where training stops at the first.

    Raises:
        DataError: data that cannot be read; shares that cannot be had.
    """
    sets, findings = mixture.entries(settings), []
    name = " + ".join(entry.source.label for entry in sets)
    if not any(entry.source.streaming for entry in sets):
        for entry in sets:
            found = read(entry.source, settings.get("on_bad_row") == "skip")[1]
            # The keys of messages are looked at with the template, by token_checks.
            findings += [finding for finding in found if finding.name != columns.UNKNOWN_KEYS]
        if any(finding.severity == ERROR for finding in findings):
            return Audit(name, None, None, findings)
    train, evaluation = mixture.load(settings)
    if isinstance(train, Stream):
        findings += [Finding(WARNING, "note", note) for note in train.notes]
        pairs = list(itertools.islice(train, STREAMED))
        train = Rows.from_pairs(train.name, pairs)
        findings.append(Finding(FIGURE, "streamed", "of the stream", figures={"rows looked at": len(train)}))
    if evaluation and not settings.get("test_split_size"):  # else they are the training set's
        findings += [Finding(WARNING, "note", note) for note in evaluation.notes]
    return Audit(name, train, evaluation, findings + check(train, limits, evaluation))


def read(source: Source, skip_bad_rows: bool = False) -> tuple[Rows, list[Finding]]:
    """The good rows of a set, and what is wrong with bad ones: errors, or warnings where they are skipped.

    Raises:
        DataError: not one row can be read.
    """
    good: list[tuple[Example, str]] = []
    bad: list[DataError] = []
    classes: dict[str, Counter[str]] = {column: Counter() for column in CLASS_COLUMNS}
    found = source.rows()
    head = list(itertools.islice(found, HEAD))
    try:
        shape = columns.usual_shape(head)
    except DataError:  # of no row; each row then says so itself
        shape = None
    converter = columns.Converter(source.label, shape, source.role_map)
    try:
        for where, row in itertools.chain(head, found):
            try:
                if isinstance(row, DataError):
                    raise row
                good.append((converter.example(where, row), where))
                for column in classes.keys() & row.keys():
                    classes[column][str(row[column])] += 1
            except DataError as error:
                bad.append(error)
    except DataError as error:  # the file ends early; what came before it is looked at all the same
        bad.append(error)
        skip_bad_rows = False
    severity = WARNING if skip_bad_rows and good else ERROR
    findings = [
        Finding(severity, "bad_row", error.what + f" ({error.why})" * bool(error.why), [error.where], error.help)
        for error in bad
    ]
    if good:
        findings += [Finding(WARNING, name, what, help=help) for name, what, help in converter.remarks()]
    findings += itertools.chain.from_iterable(_classes(column, counts) for column, counts in classes.items())
    return Rows.from_pairs(source.label, good), findings


def check(found: Rows, limits: Limits, evaluation: Rows | None = None) -> list[Finding]:
    """What rows show as text; with evaluation rows, also whether they are trained on too."""
    return [
        *_too_short(found, limits),
        *_copies(found, evaluation),
        *_suspects(found, _private, "private", "mask it, or remove the rows: what is trained can be recited"),
        *_suspects(found, _odd, "odd_characters", "repair the text where it comes from"),
        *_lengths(found),
        *_languages(found),
    ]


def spread(values: Iterable[int]) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum, each a value that is there (nearest rank)."""
    ordered = sorted(values)
    median, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return {"min": ordered[0], "median": median, "p95": p95, "max": ordered[-1]}


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
    examples = found.examples + apart.examples
    exact, near = _pairs(list(map(normal_text, examples)), list(map(own_text, examples)), own)
    places = found.where + apart.where
    for name, pairs, word in (("duplicates", exact, "exact"), ("near_duplicates", near, "near")):
        inside = [(i, j) for i, j in pairs if i < own]
        across = [(i, j) for i, j in pairs if i >= own]
        for label, what, help, these in (
            (name, f"{word} copies of other rows", "remove them, unless they are meant to weigh more", inside),
            (f"eval_{name}", f"{word} copies of trained rows in {apart.name}", "remove them from one set", across),
        ):
            if these:
                where, like = [places[i] for i, _ in these], [places[j] for _, j in these]
                yield Finding(WARNING, label, f"{what}: {len(these):,}", where, help, like)


def _pairs(wholes: list[str], words: list[str], own: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(later, earlier) positions of equal rows, and of nearly equal ones, one pair for each later row.

    Equal rows are alike as a whole; nearly equal ones are alike in their words, and as a whole.
    The first `own` rows are compared with each other, the rest with those only. What is a near copy
    stands for nothing itself: its own copies are those of the first.
    """
    from rensa import RMinHash, RMinHashLSH

    first: dict[str, int] = {}
    exact, near = [], []
    index = RMinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS, num_bands=BANDS)
    for i, whole in enumerate(wholes):
        if whole in first:
            exact.append((i, first[whole]))
            continue
        if i < own:
            first[whole] = i
        pieces = _pieces(words[i])
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update(list(pieces))
        for j in sorted(index.query(sketch))[:CANDIDATES]:
            if _alike(pieces, _pieces(words[j])) and _alike(_pieces(whole), _pieces(wholes[j])):
                near.append((i, j))
                break
        else:
            if i < own:
                index.insert(i, sketch)
    return exact, near


def _alike(pieces: set[str], others: set[str]) -> bool:
    return len(pieces & others) >= NEAR * len(pieces | others)


def _pieces(text: str) -> set[str]:
    return {text[i : i + PIECE] for i in range(max(1, len(text) - PIECE + 1))}


def _suspects(found: Rows, look: Callable[[str], list[str]], name: str, help: str) -> Iterator[Finding]:
    places: dict[str, list[str]] = {}
    for example, where in zip(found.examples, found.where, strict=True):
        for kind in look(all_text(example)):
            places.setdefault(kind, []).append(where)
    for kind, where_all in places.items():
        what = f"{kind} in {len(where_all):,} row{'s' * (len(where_all) != 1)}"
        yield Finding(WARNING, name, what, where_all, help)


def _private(text: str) -> list[str]:
    """The kinds of secrets and personal data that a text seems to hold."""
    return [kind for kind, form in PRIVATE.items() if any(_is_meant(kind, m[0]) for m in form.finditer(text))]


def _odd(text: str) -> list[str]:
    """The kinds of characters in a text that no writer meant."""
    return [kind for kind, form in ODD.items() if form.search(text)]


def _is_meant(kind: str, text: str) -> bool:
    """Whether digits can be what they look like: cards have a check digit (Luhn), phone numbers 8 to 15 digits."""
    digits = [int(c) for c in text if c.isdecimal()]
    if kind == CARD:
        doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
        return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0
    return kind != PHONE or 8 <= len(digits) <= 15


def _lengths(found: Rows) -> Iterator[Finding]:
    for label, role in (("input", "user"), ("output", "assistant")):
        lengths = [len(role_text(example, role)) for example in found.examples]
        if any(lengths):
            yield Finding(FIGURE, f"{label}_characters", f"{label} characters", figures=spread(lengths))


def _languages(found: Rows) -> Iterator[Finding]:
    """Shares of the languages, of a sample spread over the set. Short texts and numbers tell none."""
    from py3langid import classify

    sample = found.examples[:: math.ceil(len(found) / LANGUAGE_SAMPLE)]
    texts = [text for text in map(all_text, sample) if sum(map(str.isalpha, text)) >= LANGUAGE_SURE]
    counts = Counter(classify(text[:1000])[0] for text in texts)
    if counts:
        shares = {language: round(count / len(texts), 4) for language, count in counts.most_common()}
        yield Finding(FIGURE, "languages", "languages", figures=shares)


def _classes(column: str, counts: Counter[str]) -> Iterator[Finding]:
    if not 2 <= len(counts) <= min(MOST_CLASSES, counts.total() // 2):
        return
    ranked = counts.most_common()
    yield Finding(FIGURE, "classes", column, figures=dict(ranked))
    (most, many), (least, few) = ranked[0], ranked[-1]
    if many > IMBALANCE * few:
        what = f"{column} is out of balance: {many:,} rows of '{most}', {few:,} of '{least}'"
        yield Finding(WARNING, "imbalance", what, help=f"more rows of '{least}', or fewer of '{most}'")
