"""A metric over the steps as arrays: repeated steps, stretches of a long curve, running means, all in linear time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepladder.manifest import LARGEST

Numbers = np.ndarray[Any, np.dtype[Any]]


class Curve:
    """A metric over the optimizer steps.

    Args:
        steps: in any order; of a step that is there twice, the later value counts.
        values: one for each step, NaN and infinity included.
    """

    def __init__(self, steps: Sequence[int] | Numbers = (), values: Sequence[float] | Numbers = ()):
        self.steps, self.values = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
        if np.any(self.steps[1:] <= self.steps[:-1]):
            order = np.argsort(self.steps, kind="stable")
            order = order[np.append(np.diff(self.steps[order]) > 0, True)]
            self.steps, self.values = self.steps[order], self.values[order]

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Curve:
        """The steps whose value is a number."""
        good = np.abs(self.values) < LARGEST  # False for NaN
        return self if good.all() else Curve(self.steps[good], self.values[good])

    def at(self, steps: Numbers) -> Numbers:
        """The values at these steps; NaN where there is none."""
        if steps is self.steps or not len(self):
            return self.values if len(self) else np.full(len(steps), np.nan)
        places = np.minimum(np.searchsorted(self.steps, steps), len(self) - 1)
        return np.where(self.steps[places] == steps, self.values[places], np.nan)


@dataclass(frozen=True)
class Stretches:
    """A curve cut into stretches: the middle step of each, and the mean, lowest and highest of its finite values.

    Where a stretch has no finite value, all three are NaN.
    """

    steps: Numbers
    means: Numbers
    lows: Numbers
    highs: Numbers


def summarize(curve: Curve, most: int) -> Stretches:
    """Cut a curve into at most so many stretches of about one length; the first and the last point stand alone."""
    count = len(curve)
    if not count:
        return Stretches(curve.steps, *[curve.values] * 3)
    starts = np.arange(count)
    if count > most:
        starts = np.append(0, np.linspace(1, count - 1, most - 1).astype(np.int64))
    good = np.isfinite(curve.values)
    numbers = np.add.reduceat(good.astype(np.int64), starts)
    with np.errstate(invalid="ignore", over="ignore"):
        means = np.add.reduceat(np.where(good, curve.values, 0.0), starts) / np.where(numbers, numbers, np.nan)
    lows = np.minimum.reduceat(np.where(good, curve.values, np.inf), starts)
    highs = np.maximum.reduceat(np.where(good, curve.values, -np.inf), starts)
    middles = (starts + np.append(starts[1:], count) - 1) // 2
    lows, highs = (np.where(numbers, side, np.nan) for side in (lows, highs))
    return Stretches(curve.steps[middles], means, lows, highs)


def running_means(values: Numbers, half: int) -> Numbers:
    """The mean of each value and up to `half` values on either side.

    A window is the end of one block and the beginning of the next (van Herk, 1992), so that nothing is subtracted:
    with differences of running sums one value of 1e20 would erase all that follow.
    """
    count, width = len(values), 2 * half + 1
    padded = np.zeros(-(-(count + width) // width) * width)
    padded[half : half + count] = values
    blocks = padded.reshape(-1, width)
    to_end = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    before = np.zeros_like(blocks)
    np.cumsum(blocks[:, :-1], axis=1, out=before[:, 1:])
    place = np.arange(count)
    sizes = np.minimum(place + half, count - 1) - np.maximum(place - half, 0) + 1
    return (to_end[:count] + before.ravel()[width : width + count]) / sizes
