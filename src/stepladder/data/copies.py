"""Rows that are (nearly) others, found in 150 bytes of memory for each row.

Near copies: Jaccard similarity of the texts' 5-character pieces. By MinHash, 18 bands of 7 find 98.5 % of the pairs at
0.8 as candidates; each candidate is then compared exactly.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stepladder.data.formats import Example
from stepladder.data.rows import normal_text, own_text

if TYPE_CHECKING:
    import numpy as np

NEAR, PIECE, PERMUTATIONS, BANDS, CANDIDATES = 0.8, 5, 126, 18, 50
COMPARED = 200_000  # characters of a row: its pieces take a hundred times as many bytes
Pairs = tuple["array[int]", "array[int]"]


def find(examples: Sequence[Example], own: int) -> tuple[Pairs, Pairs]:
    """(later, earlier) positions of equal rows, and of nearly equal ones, one pair for each later row, in their order.

    Equal rows are alike as a whole; nearly equal ones are alike in their words, and as a whole.
    The first `own` rows are compared with each other, the rest with those only. What is a near copy
    stands for nothing itself: its own copies are those of the first.
    """
    import numpy as np

    first = _firsts(map(normal_text, examples))
    is_copy = first < np.minimum(np.arange(len(first)), own)
    exact = array("Q", np.flatnonzero(is_copy).tolist()), array("Q", first[is_copy].tolist())
    later, earlier = array("Q"), array("Q")
    buckets = _Buckets(examples, is_copy)
    for i in map(int, buckets.shared):
        words, whole = _pieces(own_text(examples[i])), _pieces(normal_text(examples[i]))
        for j in buckets.earlier(i):
            if _alike(words, _pieces(own_text(examples[j]))) and _alike(whole, _pieces(normal_text(examples[j]))):
                later.append(i)
                earlier.append(j)
                break
        else:
            buckets.stands[i] = i < own
    return exact, (later, earlier)


def _firsts(texts: Iterable[str]) -> np.ndarray:
    """Where each text stands first, as int64 [texts]; texts are known by 64 bits of a hash."""
    import numpy as np

    def hash_text(text: str) -> int:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    hashes = np.frombuffer(array("Q", map(hash_text, texts)), np.uint64)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


class _Buckets:
    """The rows that share a band of their MinHash sketches.

    Attributes:
        shared: the rows that share one, in their order.
        stands: by row, whether later ones are compared with it.
    """

    def __init__(self, examples: Sequence[Example], left_out: np.ndarray):
        import numpy as np

        keys = _band_keys(examples, left_out)
        rows = np.flatnonzero(~left_out)
        self.stands = np.zeros(len(examples), bool)
        self._first = np.empty((BANDS, len(examples)), np.int32)  # of the row's bucket
        self._next = keys.view(np.int32)  # of the row's bucket, 0 behind the last; in place of the keys
        is_shared = np.zeros(len(examples), bool)
        for band in range(BANDS):
            order = rows[np.argsort(keys[band, rows], kind="stable")]
            begins = np.append(True, keys[band, order[1:]] != keys[band, order[:-1]])[: len(order)]
            at = np.flatnonzero(begins)
            self._first[band, order] = order[at][np.cumsum(begins) - 1]
            self._next[band, order] = np.where(np.append(begins[1:], True), 0, np.append(order[1:], 0))
            is_shared[order] |= ~(begins & np.append(begins[1:], True))
        self.shared = np.flatnonzero(is_shared)

    def earlier(self, row: int) -> list[int]:
        """The rows before this one that stand and share a band with it: the first of them."""
        found: set[int] = set()
        for band in range(BANDS):
            before = at = int(self._first[band, row])
            after, taken = self._next[band], 0
            while at < row and taken < CANDIDATES:
                following = int(after[at]) or row
                if self.stands[at]:
                    found.add(at)
                    before, taken = at, taken + 1
                elif at != before:  # it is passed once only
                    after[before] = following
                at = following
        return sorted(found)[:CANDIDATES]


def _band_keys(examples: Sequence[Example], left_out: np.ndarray) -> np.ndarray:
    """32 bits of a hash of each band of each row's sketch, as uint32 [bands, rows]."""
    import numpy as np
    from rensa import RMinHash

    keys = np.zeros((BANDS, len(examples)), np.uint32)
    odd = np.random.default_rng(1).integers(2**63, size=PERMUTATIONS // BANDS, dtype=np.uint64) * 2 + 1
    for row, example in enumerate(examples):
        if not left_out[row]:
            sketch = RMinHash(num_perm=PERMUTATIONS, seed=1)
            sketch.update(list(_pieces(own_text(example))))
            keys[:, row] = (np.array(sketch.digest(), np.uint64).reshape(BANDS, -1) * odd).sum(axis=1) >> 32
    return keys


def _alike(pieces: set[str], others: set[str]) -> bool:
    both = len(pieces & others)
    return both >= NEAR * (len(pieces) + len(others) - both)


def _pieces(text: str) -> set[str]:
    return {text[i : i + PIECE] for i in range(max(1, min(len(text), COMPARED) - PIECE + 1))}
