"""An audit as a person reads it, or a program."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from rich.text import Text

from stepladder.console import printable
from stepladder.data.audit import FIGURE, WARNING, Audit, Finding
from stepladder.data.audit.token_checks import Seen
from stepladder.screen import Screen

MOST_PLACES = 10  # of a warning; --json lists all
MOST_ISSUES = 50
MOST_FIGURES = 8


def as_json(audit: Audit, seen: list[Seen]) -> dict[str, Any]:
    """Everything that was found; `rows` holds those that were asked to be shown."""
    return {
        "data": audit.name,
        "examples": len(audit.train) if audit.train else 0,
        "valid": not audit.errors,
        "findings": [dataclasses.asdict(finding) for finding in audit.findings],
        "rows": [{**vars(row), "stretches": [s._asdict() for s in row.stretches]} for row in seen],
    }


def write(audit: Audit, seen: list[Seen]) -> None:
    """Rows, figures, warnings, and last the verdict with the errors."""
    console = Screen()

    def say(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), soft_wrap=True)

    for row in seen:
        _write_row(row, console)
    say(audit.name, "bold")
    figures = [finding for finding in audit.findings if finding.severity == FIGURE]
    width = max((len(finding.what) for finding in figures), default=0)
    for finding in figures:
        say(f"  {finding.what:{width}}  {_figures(finding)}")
    for finding in audit.findings:
        if finding.severity == WARNING:
            say(f"⚠ {finding.what}", "yellow")
            for place in _places(finding)[:MOST_PLACES]:
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
    parts = [f"{name} {_number(value)}" for name, value in finding.figures.items()]
    rest = len(parts) - MOST_FIGURES
    return " · ".join(parts[:MOST_FIGURES]) + f" · and {rest} more" * (rest > 0)


def _number(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"


def _places(finding: Finding) -> list[str]:
    return [f"{a}, as {b}" if b else a for a, b in itertools.zip_longest(finding.where, finding.like)]


def _write_row(row: Seen, console: Screen) -> None:
    """A row's text, its trained tokens in colour, or between ⟦ and ⟧ where there is no colour."""
    line = Text()
    line.append(f"── {row.where} · {row.tokens:,} tokens, {row.trained:,} trained ──\n", "bold")
    for trained, stretches in itertools.groupby(row.stretches, key=lambda stretch: stretch.trained):
        marked = trained and not console.is_terminal
        line.append("⟦" * marked)
        for stretch in stretches:
            colour = "bold green" if trained else "dim"
            line.append(printable(stretch.text), f"{colour} reverse" if trained and stretch.special else colour)
        line.append("⟧" * marked)
    line.rstrip()
    if row.cut:
        line.append(f"\n✂ {row.cut:,} more tokens are cut off by max_length", "red")
    line.append("\n")
    console.print(line, soft_wrap=True)
