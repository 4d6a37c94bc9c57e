"""Translate an Axolotl configuration into a recipe, and account for every key in it.

    python scripts/import_axolotl.py config.yml -o recipe.yaml

The table says what became of each key: translated, dropped (it has no effect here, or asks for
what happens anyway), or not supported, with the reason. A key that is not supported and would
change the training (marked ✘) stops the import with exit code 2; --force leaves it out, and the
recipe's first lines say so. A recipe that is there already is kept unless --overwrite is given.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.padding import Padding
from rich.table import Table

from stepladder import errors
from stepladder.recipe.axolotl import config, importer
from stepladder.recipe.axolotl.outcome import DROPPED, TRANSLATED, UNSUPPORTED
from stepladder.recipe.axolotl.translation import Row, Translation, short
from stepladder.screen import Screen

LEAST_NOTE = 40  # columns of a terminal that reasons need beside the other three
STYLES = {TRANSLATED: "green", DROPPED: "dim", UNSUPPORTED: "yellow"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="an Axolotl configuration")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the recipe to write")
    parser.add_argument("--force", action="store_true", help="leave out what is not supported and changes the training")
    parser.add_argument("--overwrite", action="store_true", help="replace the recipe that is there")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()

    importer.check_output(args.config, args.output, args.overwrite)
    translation = importer.translate(config.read(args.config))
    stops = [row for row in translation.rows if row.stops]
    written = args.force or not stops
    if written:
        importer.write(translation, args.output)
    if args.json:
        print(json.dumps(_facts(translation, args.output if written else None), indent=2, default=str))
    else:
        _print_table(translation)
        if written:
            counts = [f"{sum(r.outcome.kind == kind for r in translation.rows)} {kind}" for kind in STYLES]
            print(f"\n✔ wrote {args.output}: {'; '.join(counts)}\n  {translation.command(str(args.output))}")
    if not written:
        raise errors.RecipeErrors([_error(row) for row in stops] + [FORCE])


FORCE = errors.RecipeError(
    "nothing was written", why="these keys would change the training", help="mend them, or leave them out by --force"
)


def _error(row: Row) -> errors.RecipeError:
    what = f"{row.key}: {short(row.value)} is not supported"
    return errors.RecipeError(what, where=row.where, why=row.outcome.reason)


def _facts(translation: Translation, recipe: Path | None) -> dict[str, object]:
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


def _print_table(translation: Translation) -> None:
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


if __name__ == "__main__":
    errors.exit_with(main)
