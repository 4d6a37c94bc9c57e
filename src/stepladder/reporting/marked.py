"""Answers side by side, with what one says and the other does not marked."""

from __future__ import annotations

import difflib
import html
import re
from typing import Any

from stepladder.reporting.runs import LoggedRun

AKIN = 0.5  # shared words of two answers (difflib's ratio) below which marking each difference says nothing


def answers(run: LoggedRun) -> list[tuple[str, list[Any], str]]:
    """Each question with the sides' answers, their differences marked, and the reference."""
    c = run.comparison
    sides = zip(*(side["answers"] for side in c["sides"]), strict=True) if c else ()
    return [
        (question, _marked(texts), reference)
        for question, texts, reference in zip(c.get("questions", ()), sides, c.get("references", ()), strict=True)
    ]


def _marked(texts: tuple[str, ...]) -> list[Any]:
    """Each text with what sets it apart from the first (the first: from the second) marked, where the two are akin."""
    from markupsafe import Markup

    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in texts]
    found = []
    for i, mine in enumerate(words):
        other, tag = (words[min(1, len(words) - 1)], "del") if i == 0 else (words[0], "ins")
        match = difflib.SequenceMatcher(None, mine, other)
        changes = match.get_opcodes() if match.ratio() >= AKIN else [("equal", 0, len(mine), 0, 0)]
        out = ""
        for kind, a, b, _, _ in changes:
            text = html.escape("".join(mine[a:b]))
            out += text if kind == "equal" or not text.strip() else f"<{tag}>{text}</{tag}>"
        found.append(Markup(out))
    return found
