"""loss.png, for where a page cannot be: a model card, a chat, a slide. Drawn with NumPy alone.

Everything is a stroke, the letters too: pixels within half a stroke's width of a line take its
colour, those on its rim a share of it.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np

from stepladder.reporting.runs import Curve, finite

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 480, 78, 40, 44, 40  # pixels
PAPER, RULE, SOFT, BLUE, RED = 0xFCFBF8, 0xDDD7CB, 0x655F56, 0x0068A8, 0xB03A22
MOST_POINTS = 400

# Letters as strokes through points (x, y) of a grid 4 wide and 8 high, the baseline at y = 6.
LETTERS = {
    "0": "1030 30 4145 3616 0501 10", "1": "0220 26", "2": "01103041420646", "3": "01103041 32 23 33 44 45 3616 05",
    "4": "3630 04 44", "5": "4000 02 32 43 45 3616 05", "6": "4030 10 01 05 16 36 45 43 32 12 03", "7": "0040 16",
    "8": "1030 41 32 12 01 10|12 03 05 16 36 45 43 32", "9": "0616 36 45 41 30 10 01 03 14 34 43", ".": "1516",
    "-": "0333", "e": "0444 43 32 12 03 05 16 36 45", "l": "1016", "o": "1232 43 45 36 16 05 03 12",
    "s": "4332 12 03 14 34 45 36 16 05", "t": "1015 26 36|0232",
    "h": "0006|0312 32 43 46", "d": "4046|4332 12 03 05 16 36 45", "u": "0205 16 36 45|4246", "r": "0206|0312 32",
    "a": "1232 43 46|4414 05 16 36 45", "i": "1216|1010", "n": "0206|0312 32 43 46",
    "g": "4247 38 18|4332 12 03 05 16 36 45",
}  # fmt: skip


def write(path: Path, loss: Curve, evaluation: Curve) -> None:
    """Draw the training loss over the steps as a line and the held-out loss as rings; nothing without a loss."""
    loss, evaluation = finite(loss), finite(evaluation)
    if not loss:
        return
    steps, values = [*loss, *evaluation], [*loss.values(), *evaluation.values()]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    pad = (max(values) - min(values) or abs(max(values)) or 1) * 0.06
    low, high = min(values) - pad, max(values) + pad

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (step - first) / (last - first), (value - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    image = np.empty((HEIGHT, WIDTH, 3))
    image[:] = _rgb(PAPER)
    for value in _ticks(low, high, 5):
        y = round(place(first, value)[1]) + 0.5
        _stroke(image, [(LEFT, y), (WIDTH - RIGHT, y)], RULE, 1)
        text = f"{value:.6g}"
        _write(image, text, LEFT - 12 - _length(text), y - 7, SOFT)
    for step in _ticks(first, last, 8):
        if step == int(step):
            text = str(int(step))
            _write(image, text, place(step, low)[0] - _length(text) / 2, HEIGHT - BOTTOM + 12, SOFT)
    _write(image, "training loss", LEFT, 14, BLUE)
    if evaluation:
        _write(image, "held out", LEFT + _length("training loss") + 36, 14, RED)
    _stroke(image, [place(*point) for point in _thinned(loss)], BLUE, 2)
    for point in evaluation.items():
        x, y = place(*point)
        ring = [(x + 4 * math.cos(i * math.pi / 8), y + 4 * math.sin(i * math.pi / 8)) for i in range(17)]
        _stroke(image, ring, RED, 2)
    _save(path, image)


def _thinned(curve: Curve) -> list[tuple[float, float]]:
    """The means of a long curve's stretches."""
    points = list(curve.items())
    size = math.ceil(len(points) / MOST_POINTS)
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    return [(fmean(step for step, _ in stretch), fmean(value for _, value in stretch)) for stretch in stretches]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values within a range, about so many."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _stroke(image: np.ndarray, points: list[tuple[float, float]], colour: int, width: float) -> None:
    """Draw a line through points, which all lie in the image; where its parts overlap they do not add up."""
    left, top = (max(0, int(min(axis)) - 3) for axis in zip(*points, strict=True))
    right, bottom = (int(max(axis)) + 4 for axis in zip(*points, strict=True))
    region = image[top:bottom, left:right]
    cover = np.zeros(region.shape[:2])
    for (x1, y1), (x2, y2) in pairwise(points):
        x_range = slice(max(0, int(min(x1, x2)) - 3 - left), int(max(x1, x2)) + 4 - left)
        y_range = slice(max(0, int(min(y1, y2)) - 3 - top), int(max(y1, y2)) + 4 - top)
        part = cover[y_range, x_range]
        y, x = np.ogrid[: part.shape[0], : part.shape[1]]
        x, y = x + (left + x_range.start + 0.5 - x1), y + (top + y_range.start + 0.5 - y1)
        dx, dy = x2 - x1, y2 - y1
        along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy or 1), 0, 1)
        np.maximum(part, np.clip(width / 2 + 0.5 - np.hypot(x - along * dx, y - along * dy), 0, 1), out=part)
    region += cover[..., None] * (_rgb(colour) - region)


def _write(image: np.ndarray, text: str, x: float, y: float, colour: int, size: float = 2.2) -> None:
    for letter in text:
        for line in LETTERS.get(letter, "").split("|"):
            digits = line.replace(" ", "")
            points = [(x + size * int(a), y + size * int(b)) for a, b in zip(digits[::2], digits[1::2], strict=True)]
            if points:
                _stroke(image, points, colour, 1.5)
        x += _advance(letter, size)


def _advance(letter: str, size: float = 2.2) -> float:
    return size * {"l": 3, "i": 3, ".": 3, " ": 3, "1": 4, "t": 5, "r": 5}.get(letter, 6)


def _length(text: str) -> float:
    return sum(map(_advance, text))


def _rgb(colour: int) -> np.ndarray:
    return np.array([colour >> 16, colour >> 8 & 255, colour & 255], float)


def _save(path: Path, image: np.ndarray) -> None:
    """Write an RGB PNG (ISO/IEC 15948) whole: header, one compressed data chunk, end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)  # each row begins with 0: it is not filtered
    rows[:, 1:] = image.round().astype(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    os.replace(part, path)
