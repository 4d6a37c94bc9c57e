"""Is a difference more than chance? Intervals and paired tests over the rows, seeded, without assumptions of shape.

A figure is the weighted mean of a value a row: Σ wᵢvᵢ / Σ wᵢ. Rows are what varies: another draw of
questions would have given other figures, and the interval says how far other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SEED, RESAMPLES, BLOCK = 42, 5000, 250
LEVEL = 0.05  # the chance of calling a difference real that is none
Floats = Sequence[float]


@dataclass(frozen=True)
class Difference:
    """Second minus first, its 95 % interval, and the chance `p` of one so large where there is no difference."""

    mean: float
    low: float
    high: float
    p: float


def interval(values: Floats, weights: Floats) -> tuple[float, float, float]:
    """The weighted mean and its 95 % percentile bootstrap interval (Efron, 1979).

    All are NaN where a value is no number.
    """
    import numpy as np

    v, w = np.asarray(values, float), np.asarray(weights, float)
    if not np.isfinite(v).all():
        return math.nan, math.nan, math.nan
    made = np.random.default_rng(SEED)
    drawn = []
    for _ in range(RESAMPLES // BLOCK):  # in blocks: thousands of rows times thousands of resamples are gigabytes
        rows = made.integers(len(v), size=(BLOCK, len(v)))
        drawn.append((v * w)[rows].sum(1) / w[rows].sum(1))
    low, high = np.quantile(np.concatenate(drawn), [LEVEL / 2, 1 - LEVEL / 2])
    return float(np.average(v, weights=w)), float(low), float(high)


def jackknife(whole: float, without: Floats) -> tuple[float, float]:
    """The 95 % interval of a figure of all items together, by those that leave out one item each (Tukey, 1958).

    For how different items are: a bootstrap draws items twice, and twins are never different.
    """
    import numpy as np

    spread = 1.96 * float(np.sqrt((len(without) - 1) * np.asarray(without, float).var()))
    return whole - spread, whole + spread


def paired(first: Floats, second: Floats, weights: Floats) -> Difference:
    """Two systems on the same rows: paired bootstrap for the interval (Koehn, 2004), paired permutation for p.

    The permutation exchanges the two values of random rows (approximate randomization: Noreen, 1989;
    Riezler & Maxwell, 2005). p counts the observed order too, so that it is never 0 (Phipson & Smyth, 2010).
    """
    import numpy as np

    w = np.asarray(weights, float)
    d = np.asarray(second, float) - np.asarray(first, float)
    mean, low, high = interval(d.tolist(), weights)
    if not math.isfinite(mean):  # NaN is not “at least as extreme” as anything: p would be the smallest there is
        return Difference(mean, low, high, 1.0)
    made = np.random.default_rng(SEED)
    extreme = 0
    for _ in range(RESAMPLES // BLOCK):
        signs = made.choice([-1.0, 1.0], size=(BLOCK, len(d)))
        extreme += _at_least((signs * d * w).sum(1), abs((d * w).sum()))
    return Difference(mean, low, high, (extreme + 1) / (RESAMPLES + 1))


def can_differ(rows: int, tests: int = 1) -> bool:
    """Whether so many rows can show a difference at all, corrected for so many tests (Holm's first factor).

    Of the 2ⁿ exchanges of n pairs, the observed one and its mirror image are always as extreme.
    """
    return 2.0 ** (1 - min(rows, 1000)) * tests < LEVEL


def _at_least(drawn: Any, observed: float) -> int:
    """How many are as far from 0 as what was observed, up to the rounding of the sums."""
    return int((abs(drawn) >= observed * (1 - 1e-9)).sum())


def holm(ps: Floats) -> list[float]:
    """p values corrected for there being several (Holm, 1979): among twenty tests one would pass by chance."""
    order, corrected, least = sorted(range(len(ps)), key=ps.__getitem__), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected
