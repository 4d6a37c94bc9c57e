"""Numbers on the command line that make sense: what is out of range is refused before anything is loaded."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def above_0(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def from_0(text: str) -> float:
    return 0.0 if float(text) == 0 else above_0(text)


def share(text: str) -> float:
    """More than 0, and 1 at most."""
    if (number := above_0(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1")
    return number
