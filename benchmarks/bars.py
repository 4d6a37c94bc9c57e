"""Draw the tables of docs/benchmarks.md as bars: docs/img/NAME.svg for each `<!-- bars: NAME -->` before a table.

    python benchmarks/bars.py

A bar is the second column's figure, a whisker the slowest and the fastest run in its brackets; rows that are in bold,
or named Stepladder, are ours. The tables are the only place where figures are typed.
"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAPER, INK, SOFT, OURS, OTHERS, WHISKER = "#fcfbf8", "#26221d", "#655f56", "#0068a8", "#b9b2a6", "#26221d"
LEFT, BAR, LINE, TOP = 420, 420, 30, 44  # pixels: where bars begin, the longest one, a row's height, the title's


def tables(page: str) -> dict[str, tuple[str, list[str]]]:
    """By name, the heading of the second column, and the rows."""
    found = re.findall(r"<!-- bars: (\w+) -->\n((?:\|.*\n)+)", page)
    return {name: (lines.splitlines()[0].split("|")[2].strip(), lines.splitlines()[2:]) for name, lines in found}


def drawing(unit: str, rows: list[str]) -> str:
    """The SVG of a table's rows."""
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    figures = [[float(figure.replace(",", "")) for figure in re.findall(r"[\d.,]+", cell)] for _, cell in cells]
    scale, height = BAR / max(map(max, figures)), TOP + LINE * len(rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + BAR + 80} {height}" font-size="14" '
        'font-family="system-ui, sans-serif">',
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        f'<text x="{LEFT}" y="24" fill="{SOFT}">{html.escape(unit)}</text>',
    ]
    for at, ((label, _), (median, *spread)) in enumerate(zip(cells, figures, strict=True)):
        y, ours = TOP + LINE * at, "**" in label or label.startswith("Stepladder")
        words = html.escape(re.sub(r"[*`]", "", label))
        parts.append(f'<text x="{LEFT - 10}" y="{y + 16}" text-anchor="end" fill="{INK}">{words}</text>')
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{median * scale:.1f}" height="22" fill="{OURS if ours else OTHERS}"/>'
        )
        if spread:
            low, high = (LEFT + figure * scale for figure in spread)
            parts.append(f'<path d="M{low:.1f} {y + 11}H{high:.1f}M{low:.1f} {y + 7}v8M{high:.1f} {y + 7}v8" '
                         f'stroke="{WHISKER}" fill="none"/>')  # fmt: skip
        end = LEFT + max(median, *spread) * scale + 8
        parts.append(f'<text x="{end:.1f}" y="{y + 16}" fill="{INK}">{median:,.0f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, (unit, rows) in tables((DOCS / "benchmarks.md").read_text()).items():
        file = DOCS / f"img/{name}.svg"
        file.write_text(drawing(unit, rows))
        print(file)


if __name__ == "__main__":
    main()
