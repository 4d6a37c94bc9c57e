"""loss.png, for where a page cannot be: a model card, a chat, a slide."""

from __future__ import annotations

import io
import math
from pathlib import Path
from statistics import fmean

from stepladder.files import write_whole
from stepladder.reporting.runs import Curve, finite

SCALE = 2  # drawn twice as large and made smaller: smooth lines
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (SCALE * length for length in (960, 480, 78, 40, 50, 40))  # pixels
PAPER, RULE, SOFT, BLUE, RED = "#fcfbf8", "#ddd7cb", "#655f56", "#0068a8", "#b03a22"
MOST_POINTS = 400


def write(path: Path, loss: Curve, evaluation: Curve) -> None:
    """Draw the training loss over the steps as a line and the held-out loss as rings; nothing without a loss."""
    from PIL import Image, ImageDraw, ImageFont  # here, so that a run without it lacks the picture only

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

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15 * SCALE)
    for value in _ticks(low, high, 5):
        y = place(first, value)[1]
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], RULE, SCALE)
        draw.text((LEFT - 12 * SCALE, y), f"{value:.6g}", SOFT, font, "rm")
    for step in _ticks(first, last, 8):
        if step == int(step):
            draw.text((place(step, low)[0], HEIGHT - BOTTOM + 12 * SCALE), str(int(step)), SOFT, font, "mt")
    draw.text((LEFT, 16 * SCALE), "training loss", BLUE, font, "lt")
    draw.line([place(*point) for point in _thinned(loss)], BLUE, 2 * SCALE, "curve")
    if evaluation:
        draw.text((LEFT + draw.textlength("training loss", font) + 24 * SCALE, 16 * SCALE), "held out", RED, font, "lt")
    for point in evaluation.items():
        draw.circle(place(*point), 4 * SCALE, outline=RED, width=2 * SCALE)
    out = io.BytesIO()
    image.resize((WIDTH // SCALE, HEIGHT // SCALE), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    write_whole(path, out.getvalue())


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
