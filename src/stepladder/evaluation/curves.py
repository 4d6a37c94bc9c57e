"""Two runs' curves compared: how far apart, and whether they drift to one side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In fp32 without dropout. Strategies sum in different orders, so the last bits differ; a lost
# row or a wrong normalization differs by 1e-3 and more. The mean residual must be ten times
# smaller: rounding goes to both sides, a defect to one (TRL, tests/invariant).
LOSS_TOLERANCE = 1e-5  # absolute, nats a token
GRAD_NORM_TOLERANCE = 1e-3  # relative


@dataclass(frozen=True)
class Difference:
    """The largest difference and the mean residual of two curves; gradient norms are relative."""

    steps: int
    loss: float
    loss_residual: float
    grad_norm: float
    grad_norm_residual: float
    eval_loss: float

    def within(self, factor: float = 1.0) -> bool:
        """Whether the curves are one, at `factor` times the tolerances of fp32."""
        return (
            max(self.loss, self.eval_loss) <= factor * LOSS_TOLERANCE
            and abs(self.loss_residual) <= factor * LOSS_TOLERANCE / 10
            and self.grad_norm <= factor * GRAD_NORM_TOLERANCE
            and abs(self.grad_norm_residual) <= factor * GRAD_NORM_TOLERANCE / 10
        )


def difference(reference: Path, other: Path) -> Difference:
    """Compare two run folders step by step; a run of another length differs infinitely."""
    first, second = (_rows(folder) for folder in (reference, other))
    if any(len(_by_step(first, key)) != len(_by_step(second, key)) for key in ("loss", "grad_norm", "eval_loss")):
        return Difference(0, *[math.inf] * 5)
    return between(first, second)


def between(reference: list[dict[str, Any]], other: list[dict[str, Any]]) -> Difference:
    """Compare the logged rows of two runs over the steps that both have; what is no number differs infinitely."""

    def pairs(key: str) -> list[tuple[float, float]]:
        first, second = _by_step(reference, key), _by_step(other, key)
        found = [(first[step], second[step]) for step in first if step in second]
        return [(a, b) if math.isfinite(a) and math.isfinite(b) else (0.0, math.inf) for a, b in found]

    loss = [b - a for a, b in pairs("loss")]
    norm = [(b - a) / a if a else b and math.inf for a, b in pairs("grad_norm")]
    evaluation = [abs(b - a) for a, b in pairs("eval_loss")]
    return Difference(
        steps=len(loss),
        loss=max(map(abs, loss), default=0.0),
        loss_residual=sum(loss) / max(len(loss), 1),
        grad_norm=max(map(abs, norm), default=0.0),
        grad_norm_residual=sum(norm) / max(len(norm), 1),
        eval_loss=max(evaluation, default=0.0),
    )


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _by_step(rows: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if isinstance(row.get(key), int | float)}
