"""What the curves are said to show, on curves made to show it."""

from __future__ import annotations

import math
import random

import pytest

from stepladder.reporting import curves
from stepladder.reporting.curves import FAULT, GOOD
from stepladder.reporting.series import Curve

STEPS = 200


def judge_curves(*values: dict[int, float]) -> list:
    """The verdicts on loss, evaluation loss and gradient norm, each given as step → value."""
    return curves.judge_curves(*(Curve([*each], [*each.values()]) for each in values))


def noise(size: float) -> list[float]:
    made = random.Random(7)
    return [made.gauss(0, size) for _ in range(STEPS + 1)]


def curve(value, size: float = 0.05) -> dict[int, float]:
    """Losses of steps 1 to STEPS with the noise of batches."""
    around = noise(size)
    return {step: value(step) + around[step] for step in range(1, STEPS + 1)}


def held_out(value) -> dict[int, float]:
    return {step: value(step) for step in range(20, STEPS + 1, 20)}


def falling(end: float = 1.5, pace: float = 30):
    return lambda step: end + 2 * math.exp(-step / pace)


# A real run whose learning rate is too low: LoRA on SmolLM2 at 3e-5 (slurm/sweeps/without_regret.yaml).
SLOW = [3.73, 3.50, 3.35, 3.61, 3.39, 3.52, 3.37, 3.45, 2.88, 3.29, 3.27, 3.51, 3.37, 3.67,
        3.44, 3.33, 3.43, 3.32, 3.28, 3.11, 3.56, 3.30, 3.26, 3.56, 3.43, 3.35, 3.64]  # fmt: skip
NORM = dict.fromkeys(range(1, STEPS + 1), 1.0)
CASES = {
    "does well": (curve(falling()), held_out(falling(1.6)), {"converged", "generalizes"}),
    "gap": (curve(falling()), held_out(falling(2.0)), {"converged", "gap"}),
    "overfits": (
        curve(falling(0.8, 40), 0.03), held_out(lambda step: 2 + 0.004 * abs(step - 80)),
        {"converged", "overfitting", "gap"},
    ),
    "train to zero": (curve(falling(0.02, 40), 0.005), held_out(falling(1.8)), {"converged", "memorized", "gap"}),
    "diverges": (curve(lambda step: 2 + 0.02 * step), held_out(falling()), {"diverged"}),
    "falls and comes back": (curve(lambda step: 1.5 + 2 * abs(step - 60) / 140), {}, {"diverged", "not evaluated"}),
    "slow and noisy": (
        dict(enumerate(SLOW, 1)), {9: 3.464, 18: 3.443, 27: 3.440}, {"converged", "generalizes"},
    ),
    "unmoved": (curve(lambda step: 3.0), held_out(lambda step: 3.0), {"plateau"}),
    "flat early": (curve(falling(1.5, 8)), held_out(falling(1.6, 8)), {"plateau", "generalizes"}),
    "still falling": (curve(lambda step: 4 - 0.01 * step), held_out(lambda step: 4 - 0.01 * step),
                      {"still falling", "generalizes"}),
    "bounces": (curve(lambda step: falling()(step) + (-1) ** step), held_out(falling(1.6)),
                {"oscillation", "generalizes"}),
    "swings slowly": (curve(lambda step: falling()(step) + math.sin(step / 4)), held_out(falling(1.6)),
                      {"oscillation", "generalizes"}),
    "eight steps": ({step: 3 - 0.2 * step for step in range(1, 8)}, {}, {"too short"}),
    "nothing": ({}, {}, {"too short"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdicts_on_curves_made_to_show_them(name: str) -> None:
    """Guards against a fault that is missed, and against one that is seen where there is none."""
    train, evaluation, expected = CASES[name]
    found = judge_curves(train, evaluation, NORM)
    names = {verdict.name for verdict in found}
    assert names == expected, found
    assert all(verdict.evidence for verdict in found)
    assert all(verdict.help for verdict in found if verdict.severity != GOOD)


@pytest.mark.parametrize("which", ["loss", "grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_named_with_its_step(which: str, value: float) -> None:
    """Guards NaN in any of the three: Transformers' filter hides it in the loss, the gradient norm still shows it."""
    broken = {"loss": curve(falling()), "eval_loss": held_out(falling(1.6)), "grad_norm": dict(NORM)}
    for step in range(120, STEPS + 1, 20):
        broken[which][step] = value
    worst = judge_curves(*broken.values())[0]
    assert (worst.severity, worst.name, worst.figures["step"]) == (FAULT, "diverged", 120)


def test_the_phases_lie_where_the_curve_turns() -> None:
    """The knee and the final level of an exponential, known from its pace (30 steps)."""
    (converged, _) = sorted(judge_curves(CASES["does well"][0], CASES["does well"][1], NORM), key=lambda v: v.name)
    # The chord's slope is met at 30·ln(200/30) = 57; 5 % of the drop are left at 90. Smoothing and noise: ± 20 steps.
    assert abs(converged.figures["knee"] - 57) < 20 and abs(converged.figures["level_since"] - 90) < 20, converged
