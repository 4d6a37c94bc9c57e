"""What became of each key of an Axolotl configuration, as a table or as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.padding import Padding
from rich.table import Table

from stepladder.recipe.axolotl.outcome import DROPPED, TRANSLATED, UNSUPPORTED
from stepladder.recipe.axolotl.translation import Translation, short
from stepladder.screen import Screen

LEAST_NOTE = 40  # columns of a terminal that reasons need beside the other three
STYLES = {TRANSLATED: "green", DROPPED: "dim", UNSUPPORTED: "yellow"}


def as_json(translation: Translation, recipe: Path | None) -> dict[str, object]:
    return {
        "config": str(translation.source),
        "recipe": str(recipe) if recipe else None,
        "command": translation.command(str(recipe)) if recipe else None,
        "keys": [
            {
                "key": row.key,
                "value": row.value,
                "outcome": row.outcome.kind,
                "to": translation.target(row),
                "reason": row.outcome.reason,
                "changes_training": row.stops,
                "where": row.where,
            }
            for row in translation.rows
        ],
    }


def write(translation: Translation) -> None:
    """Colours and columns for a person's terminal, or two lines per key where columns would be cut; aligned lines, each
    whole, for a file or a pipe."""
    lines = []
    for row in translation.rows:
        kind = f"✘ {row.outcome.kind}" if row.stops else row.outcome.kind
        value = "(not set)" if row.implied else short(row.value)
        target = translation.target(row)
        note = "; ".join(part for part in (target and f"→ {target}", row.outcome.reason) if part)
        lines.append((row.key, value, kind, note))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    if sys.stdout.isatty():
        screen = Screen()
        styles = ["bold red" if row.stops else STYLES[row.outcome.kind] for row in translation.rows]
        if sum(widths) + LEAST_NOTE <= screen.width:
            table = Table("Axolotl's key", "value", "outcome", "in the recipe, or why", box=None, header_style="bold")
            for style, line in zip(styles, lines, strict=True):
                table.add_row(*line, style=style)
            screen.print(table)
            return
        screen.print("Axolotl's key: its value\n  outcome: in the recipe, or why", style="bold")
        for style, (key, value, kind, note) in zip(styles, lines, strict=True):
            screen.print(f"{key}: {value}", style=style)
            screen.print(Padding(f"{kind}: {note}" if note else kind, (0, 0, 0, 2)), style=style)
        return
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)) + "  " + line[3])
