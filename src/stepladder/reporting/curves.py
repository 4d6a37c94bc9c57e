"""A run's curves: named verdicts, each with its figures and what to do; how two runs differ; loss.png.

All is drawn from metrics.jsonl alone. The loss is noisy, so it is judged by levels (means over a
tenth of the run) and by its wobble: the standard deviation about a straight line through the
second half, where the curve itself is nearly straight.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepladder import installation
from stepladder.errors import FAULT, GOOD, LOOK, Verdict
from stepladder.files import write_atomic
from stepladder.manifest import stop_reason
from stepladder.reporting.runs import LoggedRun, read
from stepladder.reporting.series import Curve, Numbers, running_means, summarize

LEAST = 8  # logged losses below which a curve has no shape
FLAT = 0.05  # of the whole drop: what still counts as the final level
CONVERGED, PLATEAU = 0.15, 0.6  # shares of the run that lie at the final level
UNMOVED = 0.02  # of the first loss
OSCILLATION = (0.1, 0.25)  # wobble, as shares of the loss and of its drop
MEMORIZED = 0.1  # nats per token: each trained token is given a probability of 0.9
GAP = 0.3  # nats per token: held-out perplexity 1.35 times that of training
RISE = 0.02  # of the lowest evaluation loss
# In fp32 without dropout. Strategies sum in different orders, so the last bits differ; a lost
# row or a wrong normalization differs by 1e-3 and more. The mean residual must be ten times
# smaller: rounding goes to both sides, a defect to one (TRL, tests/invariant).
LOSS_TOLERANCE = 1e-5  # absolute, nats per token
GRAD_NORM_TOLERANCE = 1e-3  # relative
SCALE = 2  # drawn twice as large and made smaller: smooth lines
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (SCALE * length for length in (960, 480, 78, 40, 50, 40))  # pixels
PAPER, RULE, SOFT, BLUE, RED = "#fcfbf8", "#ddd7cb", "#655f56", "#0068a8", "#b03a22"
MOST_POINTS = 400


def judge_curves(train: Curve, evaluation: Curve, grad_norm: Curve, result: int | None = None) -> list[Verdict]:
    """The verdicts on a run's loss, evaluation loss and gradient norm; the worst come first.

    Args:
        result: the step whose weights are the run's result; None for the last one.
    """
    found = [*_broken({"loss": train, "evaluation loss": evaluation, "gradient norm": grad_norm})]
    train, evaluation = train.finite(), evaluation.finite()
    if len(train) < LEAST:
        evidence, help = f"{len(train)} logged losses; {LEAST} are needed", "train on, or lower logging_steps"
        found.append(Verdict(LOOK, "too short", "Too few losses to judge.", evidence, help))
    else:
        shape = _Shape(train)
        course, bouncing = [*_course(shape, _ends_lowest(evaluation))], [*_oscillation(shape)]
        learned = all(verdict.severity != FAULT for verdict in course + found)
        if not (learned and bouncing):  # phases cannot be distinguished from swings
            found += course
        found += [*bouncing, *_memorization(shape, evaluation, learned, result)]
    return sorted(found, key=lambda verdict: (FAULT, LOOK, GOOD).index(verdict.severity))


def judge_early_stop(stopped: dict[str, Any]) -> list[Verdict]:
    """The verdict on a run that early stopping has ended, from the `stopped_early` of run.json."""
    what, evidence = "It ended where the evaluations no longer improved.", stop_reason(stopped)
    return [Verdict(GOOD, "stopped early", what, evidence, figures={"step": stopped["step"]})]


def judge_evaluation_rows(rows: int, trained_on: int | None, foreign: str) -> list[Verdict]:
    """The verdicts on rows that a run was evaluated on: whether they were held out, and of its own data.

    Args:
        trained_on: how many of the rows were trained on too; None where that is not known.
        foreign: the set, where it came with other training data than the run's.
    """
    found = []
    if trained_on:
        what, evidence = "Rows that it is evaluated on are trained on too.", f"{trained_on:,} of {rows:,} rows"
        audit = f"{installation.command('check')} --audit"
        help = f"remove the copies from one of the sets ({audit} names them), or test_split_size"
        found.append(Verdict(LOOK, "not held out", what, evidence, help))
    if foreign:
        what, help = "It is evaluated on rows that came with other data.", "eval_dataset_name, or test_split_size"
        found.append(Verdict(LOOK, "foreign evaluation", what, f"evaluated on {foreign}", help))
    return found


class _Shape:
    """Levels of a noisy curve: where it starts and ends, its lowest, its wobble (all nats per token)."""

    def __init__(self, curve: Curve):
        self.steps, self.values = curve.steps, curve.values
        count = len(self.values)
        self.window = max(3, count // 10)
        self.smooth = running_means(self.values, self.window // 2)
        self.start = float(self.values[: max(1, min(10, count // 30))].mean())
        self.end = float(self.values[-self.window :].mean())
        self.lowest = int(self.smooth.argmin())
        self.low = float(self.smooth[self.lowest])
        self.late = self.values[count // 2 :]
        self.level, self.wobble = float(self.late.mean()), _about_a_line(self.late)
        self.error = self.wobble / math.sqrt(self.window)  # standard error of a level
        self.drop = self.start - self.end

    def knee(self) -> int:
        """The point farthest below the chord from first to last loss (Satopää et al., 2011, Kneedle)."""
        chord = self.start - self.drop * np.linspace(0, 1, len(self.smooth))
        return int((self.smooth - chord).argmin())

    def flat_from(self) -> int:
        """The first point from which on the curve stays at its final level."""
        tolerance = max(2 * self.error, FLAT * self.drop)
        away = np.flatnonzero(np.abs(self.smooth - self.end) > tolerance)
        return min(int(away[-1]) + 1, len(self.smooth) - 1) if len(away) else 0


def _about_a_line(values: Numbers) -> float:
    """Standard deviation about the least-squares line."""
    place, above = np.arange(len(values)) - (len(values) - 1) / 2, values - values.mean()
    slope = (place * above).sum() / (place**2).sum()
    return math.sqrt(((above - slope * place) ** 2).mean())


def _broken(curves: dict[str, Curve]) -> Iterator[Verdict]:
    """The first value that is not finite, of the first curve that has one."""
    for name, curve in curves.items():
        bad = np.flatnonzero(~np.isfinite(curve.values))
        if len(bad):
            step = int(curve.steps[bad[0]])
            what, evidence = f"The {name} is not a number.", f"{name} {curve.values[bad[0]]} at step {step}"
            help = "a third of learning_rate, longer warmup_steps, max_grad_norm: 1.0; bf16 or fp32 in place of fp16"
            yield Verdict(FAULT, "diverged", what, evidence, help, {"step": step, "values": len(bad)})
            return


def _ends_lowest(evaluation: Curve) -> bool:
    """Whether the held-out loss fell to its lowest value at the end: single batches of training say less."""
    return len(evaluation) > 1 and int(evaluation.values.argmin()) == len(evaluation) - 1


def _course(s: _Shape, improved: bool) -> Iterator[Verdict]:
    """Divergence, or the three phases of a loss that falls: sharp drop, stabilization, convergence.

    Args:
        improved: whether the held-out loss is lowest at the end. What a few noisy batches lost is no divergence then.
    """
    moved = max(2 * s.error, UNMOVED * s.start)
    figures = {"start": s.start, "lowest": s.low, "end": s.end}
    gained, lost = s.start - s.low, s.end - s.low
    if -s.drop > moved or (lost > gained / 2 and lost > 2 * s.wobble and not improved):
        evidence = f"{s.start:.3f} at the start, lowest {s.low:.3f} near step {s.steps[s.lowest]}, {s.end:.3f} last"
        help = "a third of learning_rate, longer warmup_steps, max_grad_norm: 1.0"
        yield Verdict(FAULT, "diverged", "The loss grew.", evidence, help, figures)
        return
    if s.drop <= moved:
        evidence = f"{s.start:.3f} at the start, {s.end:.3f} at the end; single steps vary by ±{s.wobble:.3f}"
        show = f"{installation.command('check')} --show 3"
        help = f"a higher learning_rate; see with {show} whether the right tokens are trained"
        yield Verdict(FAULT, "plateau", "The loss did not fall.", evidence, help, figures)
        return
    flat = s.flat_from()
    knee = min(s.knee(), flat)
    share = 1 - flat / len(s.steps)
    phases = f"sharp drop to step {s.steps[knee]} ({s.start:.3f} → {s.smooth[knee]:.3f})"
    if share < CONVERGED:
        phases += f", then falling to {s.end:.3f}"
    else:
        phases += f", stabilization to step {s.steps[flat]}" * (flat > knee) + f", level at {s.end:.3f} since"
    figures |= {"knee": int(s.steps[knee]), "level_since": int(s.steps[flat]), "level_share": share}
    if share < CONVERGED:
        what, help = "The loss was still falling at the end.", "more steps may help; watch the evaluation loss"
        yield Verdict(LOOK, "still falling", what, phases, help, figures)
    elif share > PLATEAU:
        what = f"The last {share:.0%} of the run changed nothing."
        help = "fewer steps do the same; for a lower loss a higher learning_rate or lora_r, or more data"
        yield Verdict(LOOK, "plateau", what, phases, help, figures)
    else:
        what = "The loss went through its three phases: sharp drop, stabilization, convergence."
        yield Verdict(GOOD, "converged", what, phases, figures=figures)


def _oscillation(s: _Shape) -> Iterator[Verdict]:
    of_level, of_drop = OSCILLATION
    if s.wobble > of_level * s.level and s.wobble > of_drop * s.drop:
        leap = float(np.abs(np.diff(s.late)).max())
        evidence = f"±{s.wobble:.3f} about {s.level:.3f} in the second half, up to {leap:.3f} from step to step"
        help = "a lower learning_rate, or a larger global_batch_size"
        figures = {"wobble": s.wobble, "level": s.level, "largest_leap": leap}
        yield Verdict(LOOK, "oscillation", "The loss bounces up and down.", evidence, help, figures)


def _memorization(s: _Shape, evaluation: Curve, learned: bool, result: int | None) -> Iterator[Verdict]:
    """Train-to-zero, an evaluation loss that rises again, and the gap between the two losses.

    Where the result is the best step (`load_best_model_at_end`), the rise after it is no fault of the result.
    """
    if s.end < MEMORIZED:
        evidence = f"{s.end:.4f} nats per token: each is given a probability of {math.exp(-s.end):.1%}"
        help = "fewer epochs, a lower learning_rate, more rows; ask it what is not in the data"
        what = "The training loss went to zero: the rows are known by heart."
        yield Verdict(FAULT, "memorized", what, evidence, help, {"end": s.end})
    if not len(evaluation):
        what, evidence = "Nothing was held out, so nothing tells learning from memorizing.", "no evaluation loss"
        yield Verdict(LOOK, "not evaluated", what, evidence, "eval_dataset_name and eval_strategy: epoch")
        return
    place = evaluation.values.argmin()
    best, low = int(evaluation.steps[place]), float(evaluation.values[place])
    end, last = float(evaluation.values[-1]), evaluation.steps[-1]
    gap = end - s.end
    figures = {"best": low, "best_step": best, "end": end, "gap": gap}
    if end - low > RISE * low:
        evidence = f"lowest at step {best} with {low:.3f}, {end:.3f} at step {last}"
        if result == best:
            what, help = f"The evaluation loss rises again after step {best}, which is the result.", "fewer epochs"
            yield Verdict(LOOK, "overfitting", what, evidence, help, figures)
            return
        help = f"stop near step {best}: early_stopping_patience, fewer epochs; or lora_dropout, weight_decay, more rows"
        yield Verdict(FAULT, "overfitting", "The evaluation loss rises again.", evidence, help, figures)
    if gap > GAP:
        evidence = f"{end:.3f} held out, {s.end:.3f} in training: perplexity {math.exp(min(gap, 50)):.2f} times as high"
        compare = installation.command("compare")
        help = f"fewer epochs, more or more varied rows; {compare} shows whether the answers are still good"
        yield Verdict(LOOK, "gap", "The held-out loss lies far above the training loss.", evidence, help, figures)
    elif learned and end - low <= RISE * low:
        evidence = f"{end:.3f} held out, {s.end:.3f} in training: {gap:+.3f}"
        yield Verdict(GOOD, "generalizes", "What was learned holds on rows not trained on.", evidence, figures=figures)


@dataclass(frozen=True)
class CurveDifference:
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


def difference(reference: Path, other: Path) -> CurveDifference:
    """Compare two run folders step by step; a run of another length differs infinitely."""
    first, second = read(reference), read(other)
    if any(len(first.curve(key)) != len(second.curve(key)) for key in ("loss", "grad_norm", "eval_loss")):
        return CurveDifference(0, *[math.inf] * 5)
    return between(first, second)


def describe_difference(first: LoggedRun, other: LoggedRun) -> dict[str, str]:
    """The difference of a run's curves from another's, in columns for a table."""
    found = between(first, other)
    return {
        "run": other.name,
        "steps compared": f"{found.steps:,}",
        "largest difference of the loss": f"{found.loss:.2g}",
        "mean": f"{found.loss_residual:+.1g}",
        "of the gradient norm, relative": f"{found.grad_norm:.2g}",
        "of the held-out loss": f"{found.eval_loss:.2g}",
        "the same curve (fp32)": "yes" if found.steps and found.within() else "no",
    }


def between(reference: LoggedRun, other: LoggedRun) -> CurveDifference:
    """Compare the curves of two runs over the steps that both have; a value that is not a number differs infinitely."""

    def pairs(key: str) -> tuple[Numbers, Numbers]:
        first, second = reference.curve(key), other.curve(key)
        steps = np.intersect1d(first.steps, second.steps, assume_unique=True)
        a, b = first.at(steps), second.at(steps)
        good = np.isfinite(a) & np.isfinite(b)
        return np.where(good, a, 0.0), np.where(good, b, np.inf)

    a, b = pairs("grad_norm")
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.where(a != 0, (b - a) / a, np.where(b != 0, np.inf, 0.0))
    loss, evaluation = (after - before for before, after in (pairs("loss"), pairs("eval_loss")))
    return CurveDifference(
        steps=len(loss),
        loss=float(np.abs(loss).max(initial=0.0)),
        loss_residual=float(loss.sum()) / max(len(loss), 1),
        grad_norm=float(np.abs(norm).max(initial=0.0)),
        grad_norm_residual=float(norm.sum()) / max(len(norm), 1),
        eval_loss=float(np.abs(evaluation).max(initial=0.0)),
    )


def step_marks(facts: dict[str, Any]) -> list[tuple[int, str]]:
    """The steps of a run that its charts mark, with a label: where early stopping ended it, and the best step before.

    Args:
        facts: the run's manifest.
    """
    stopped = facts.get("stopped_early") or {}
    labels = {"best_step": "best step", "step": "stopped early"}
    return [(stopped[key], f"{label}: {stopped[key]}") for key, label in labels.items() if stopped.get(key) is not None]


def draw_loss(path: Path, loss: Curve, evaluation: Curve, marks: Sequence[tuple[int, str]] = ()) -> None:
    """Draw the training loss over the steps as a line and the held-out loss as rings; nothing without a loss.

    Args:
        marks: steps at which a labelled vertical line is drawn.
    """
    from PIL import Image, ImageDraw, ImageFont  # here, so that a run without it lacks the picture only

    loss, evaluation = loss.finite(), evaluation.finite()
    if not len(loss):
        return
    steps, values = np.append(loss.steps, evaluation.steps), np.append(loss.values, evaluation.values)
    first, last = int(steps.min()), int(max(steps.max(), steps.min() + 1))
    lowest, highest = float(values.min()), float(values.max())
    pad = (highest - lowest or abs(highest) or 1) * 0.06
    low, high = lowest - pad, highest + pad

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
    for row, (step, label) in enumerate(marks):
        if first <= step <= last:
            x, y = place(step, low)[0], TOP + (4 + 20 * row) * SCALE
            beside = -6 * SCALE if x > WIDTH / 2 else 6 * SCALE
            draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], SOFT, SCALE)
            draw.text((x + beside, y), label, SOFT, font, "rt" if beside < 0 else "lt")
    draw.text((LEFT, 16 * SCALE), "training loss", BLUE, font, "lt")
    draw.line([place(*point) for point in _points(loss)], BLUE, 2 * SCALE, "curve")
    if len(evaluation):
        draw.text((LEFT + draw.textlength("training loss", font) + 24 * SCALE, 16 * SCALE), "held out", RED, font, "lt")
    for point in _points(evaluation):
        draw.circle(place(*point), 4 * SCALE, outline=RED, width=2 * SCALE)
    out = io.BytesIO()
    image.resize((WIDTH // SCALE, HEIGHT // SCALE), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    write_atomic(path, out.getvalue())


def _points(curve: Curve) -> list[tuple[float, float]]:
    """Steps and values; of a long curve the means of its stretches."""
    short = summarize(curve, MOST_POINTS)
    return list(zip(short.steps.tolist(), short.means.tolist(), strict=True))


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values within a range, about so many."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
