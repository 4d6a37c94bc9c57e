"""Did you mean …? The known words nearest to one that is not known."""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST_PART = 4  # letters: `model` finds `model_name_or_path`, but `lr` had better find nothing


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'a' or 'b'?`, or nothing where no known word is near."""
    found = nearest(word, known)
    return f"did you mean {' or '.join(repr(name) for name in found)}?" if found else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """At most three known words, the best first, none of them much farther away than the best."""
    text = _plain(word)
    allowed = max(1, len(text) // 3)
    distances = {}
    for name in known:
        if abs(len(name) - len(text)) <= allowed:
            distances[name] = distance(text, _plain(name))
    best = min(distances.values(), default=allowed + 1)
    if best > allowed:
        return _sharing_a_part(text, known)
    limit = best + 1 if best else 0
    near = [name for name, far in distances.items() if far <= limit]
    return sorted(near, key=lambda name: (distances[name], -_same_beginning(text, _plain(name))))[:3]


def distance(a: str, b: str) -> int:
    """Slips between two words: letters left out, added, replaced, or swapped with their neighbour."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, before, row = before, row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[-1] = min(row[-1], last[j - 2] + 1)
    return row[-1]


def _same_beginning(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _sharing_a_part(text: str, known: Iterable[str]) -> list[str]:
    """`epochs` is far from `num_train_epochs` letter by letter, and yet a part of it."""
    if len(text) < SHORTEST_PART:
        return []
    return sorted((name for name in known if f"_{text}_" in f"_{_plain(name)}_"), key=len)[:3]


def _plain(word: str) -> str:
    return word.strip().casefold().replace("-", "_").replace(" ", "_")
