"""An audit: what is found in a set or in what a recipe trains on, as a person reads it or a program."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from stepladder import installation
from stepladder.console import printable
from stepladder.data import columns, loss_keys, mixture, render
from stepladder.data.file_list import FileList
from stepladder.data.formats import Example
from stepladder.data.row_checks import ERROR, FIGURE, WARNING, Finding, Limits, check_texts
from stepladder.data.rows import Rows, Stream
from stepladder.data.source import SAMPLED_ROWS, Source
from stepladder.errors import DataError
from stepladder.screen import Screen
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STREAMED = 10_000  # rows of a stream that are looked at
CLASS_COLUMNS = ("category", "label", "class", "topic", "intent")
MOST_CLASSES = 50  # more values than that are no classes
IMBALANCE = 10  # how many times more frequent the commonest class may be than the rarest
MOST_PLACES = 10  # of a warning; --json lists all
MOST_ISSUES = 50
MOST_FIGURES = 8


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


def audit_source(name: str, limits: Limits) -> Audit:
    """A file, folder or hub data set by itself.

    Raises:
        DataError: it cannot be read at all.
    """
    found, findings = _read(Source(name))
    return Audit(name, found, None, findings + (check_texts(found, limits) if found else []))


def audit_recipe(settings: Settings, limits: Limits) -> Audit:
    """What a recipe trains and evaluates on. Bad rows are all listed, where training stops at the first.

    Raises:
        DataError: data that cannot be read; shares that cannot be had.
    """
    sets, findings = mixture.entries(settings), []
    name = " + ".join(entry.source.label for entry in sets)
    if not any(entry.source.streaming for entry in sets):
        for entry in sets:
            found = _read(entry.source, settings.get("on_bad_row") == "skip")[1]
            # The keys of messages are looked at with the template, by check_tokens.
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
    return Audit(name, train, evaluation, findings + check_texts(train, limits, evaluation))


def _read(source: Source, skip_bad_rows: bool = False) -> tuple[Rows, list[Finding]]:
    """The good rows of a set, and what is wrong with bad ones: errors, or warnings where they are skipped.

    Raises:
        DataError: not one row can be read.
    """
    good, places = FileList[Example](), FileList[str]()
    bad: list[DataError] = []
    classes: dict[str, Counter[str]] = {column: Counter() for column in CLASS_COLUMNS}
    found = source.rows()
    head = list(itertools.islice(found, SAMPLED_ROWS))
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
                good.append(converter.example(where, row))
                places.append(where)
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
    return Rows(source.label, good, places), findings


def stop_on_errors(findings: Iterable[Finding]) -> None:
    """Raise the first error as DataError, with the number of others."""
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        first, others = errors[0], len(errors) - 1
        why = f"rows: {', '.join(first.where[:5])}{', …' * (len(first.where) > 5)}" if first.where else ""
        more = f"{others} more errors: {installation.command('check')} --recipe … --audit lists them"
        raise DataError(first.what, why="; ".join([why] * bool(why) + [more] * bool(others)), help=first.help)


def _classes(column: str, counts: Counter[str]) -> Iterator[Finding]:
    if not 2 <= len(counts) <= min(MOST_CLASSES, counts.total() // 2):
        return
    ranked = counts.most_common()
    yield Finding(FIGURE, "classes", column, figures=dict(ranked))
    (most, many), (least, few) = ranked[0], ranked[-1]
    if many > IMBALANCE * few:
        what = f"{column} is out of balance: {many:,} rows of '{most}', {few:,} of '{least}'"
        yield Finding(WARNING, "imbalance", what, help=f"more rows of '{least}', or fewer of '{most}'")


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind, as text."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class RowView:
    """A row as the model sees it: its tokens, how many are trained, and how many max_length cuts off.

    Of a very long row (`is_whole` is false) tokens and cut ones are counted in its beginning alone.
    """

    where: str
    tokens: int
    trained: int
    cut: int
    is_whole: bool
    stretches: list[Stretch]


def view_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings, count: int) -> Iterator[RowView]:
    """The first rows as the model sees them."""
    max_length = settings.get("max_length")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = rows.take(range(min(count, len(rows))))
    reasoning = loss_keys.reasoning_mode(settings)
    rendered = render.tokenize(first, tokenizer, loss_keys.mode(settings), None, max_length, reasoning)
    for where, row in zip(first.where, rendered, strict=True):
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
        yield RowView(where, len(ids), sum(trained for trained, _ in kinds), cut, row.is_whole, stretches)


def as_json(audit: Audit, views: list[RowView]) -> dict[str, Any]:
    """Everything that was found; `rows` holds those that were asked to be shown."""
    return {
        "data": audit.name,
        "examples": len(audit.train) if audit.train else 0,
        "valid": not audit.errors,
        "findings": [
            {**vars(finding), "where": list(finding.where), "like": list(finding.like)} for finding in audit.findings
        ],
        "rows": [{**vars(row), "stretches": [stretch._asdict() for stretch in row.stretches]} for row in views],
    }


def print_audit(audit: Audit, views: list[RowView]) -> None:
    """Rows, figures, warnings, and last the verdict with the errors."""
    console = Screen()

    def say(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), soft_wrap=True)

    for row in views:
        _write_row(row, console)
    say(audit.name, "bold")
    figures = [finding for finding in audit.findings if finding.severity == FIGURE]
    width = max((len(finding.what) for finding in figures), default=0)
    for finding in figures:
        say(f"  {finding.what:{width}}  {_figures(finding)}")
    for finding in audit.findings:
        if finding.severity == WARNING:
            say(f"⚠ {finding.what}", "yellow")
            for place in _places(finding, MOST_PLACES):
                say(f"    {place}")
            if (more := len(finding.where) - MOST_PLACES) > 0:
                say(f"    … and {more:,} more; --json lists all")
            if finding.help:
                say(f"    help: {finding.help}")
    if audit.train and not audit.errors:
        say(f"✅ Dataset valid! {len(audit.train)} examples ready for fine-tuning.", "green")
        return
    say("❌ Issues found:", "red")
    issues = [(place, error) for error in audit.errors for place in _places(error) or [""]]
    for place, error in issues[:MOST_ISSUES]:
        say(f"  - {place}: {error.what}" if place else f"  - {error.what}")
        if error.help:
            say(f"    help: {error.help}", "dim")
    if len(issues) > MOST_ISSUES:
        say(f"  … and {len(issues) - MOST_ISSUES:,} more; --json lists all")


def _figures(finding: Finding) -> str:
    figures = finding.figures.items()
    parts = [f"{name} {value:.1%}" if isinstance(value, float) else f"{name} {value:,}" for name, value in figures]
    rest = len(parts) - MOST_FIGURES
    return " · ".join(parts[:MOST_FIGURES]) + f" · and {rest} more" * (rest > 0)


def _places(finding: Finding, most: int | None = None) -> list[str]:
    pairs = itertools.zip_longest(finding.where[:most], finding.like[:most])
    return [f"{a}, as {b}" if b else a for a, b in pairs]


def _at_least(row: RowView) -> str:
    return "" if row.is_whole else "at least "


def _write_row(row: RowView, console: Screen) -> None:
    """A row's text, its trained tokens in colour, or between ⟦ and ⟧ where there is no colour."""
    line = Text()
    line.append(f"── {row.where} · {_at_least(row)}{row.tokens:,} tokens, {row.trained:,} trained ──\n", "bold")
    for trained, stretches in itertools.groupby(row.stretches, key=lambda stretch: stretch.trained):
        marked = trained and not console.is_terminal
        line.append("⟦" * marked)
        for stretch in stretches:
            colour = "bold green" if trained else "dim"
            line.append(printable(stretch.text), f"{colour} reverse" if trained and stretch.special else colour)
        line.append("⟧" * marked)
    line.rstrip()
    if row.cut:
        line.append(f"\n✂ {_at_least(row)}{row.cut:,} more tokens are cut off by max_length", "red")
    line.append("\n")
    console.print(line, soft_wrap=True)
