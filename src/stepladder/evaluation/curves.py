"""Two runs' curves compared: how far apart, and whether they drift to one side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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


def read(folder: Path, key: str) -> list[float]:
    """The values of one metric in metrics.jsonl, in their order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def difference(reference: Path, other: Path) -> Difference:
    """Compare two run folders step by step; a run of another length differs infinitely."""
    curves = {key: (read(reference, key), read(other, key)) for key in ("loss", "grad_norm", "eval_loss")}
    if any(len(a) != len(b) for a, b in curves.values()):
        return Difference(0, *[float("inf")] * 5)
    loss = [b - a for a, b in zip(*curves["loss"], strict=True)]
    norm = [(b - a) / a for a, b in zip(*curves["grad_norm"], strict=True)]
    evaluation = [abs(b - a) for a, b in zip(*curves["eval_loss"], strict=True)]
    return Difference(
        steps=len(loss),
        loss=max(map(abs, loss), default=0.0),
        loss_residual=sum(loss) / max(len(loss), 1),
        grad_norm=max(map(abs, norm), default=0.0),
        grad_norm_residual=sum(norm) / max(len(norm), 1),
        eval_loss=max(evaluation, default=0.0),
    )
