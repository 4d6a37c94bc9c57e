"""What a loss curve says: named verdicts, each with its figures and what to do.

All are drawn from metrics.jsonl alone. The loss is noisy, so it is judged by levels (means over a
tenth of the run) and by its wobble: the standard deviation about a straight line through the
second half, where the curve itself is nearly straight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean

from stepladder.errors import FAULT, GOOD, LOOK, Verdict
from stepladder.reporting.runs import Curve, finite

LEAST = 8  # logged losses below which a curve has no shape
FLAT = 0.05  # of the whole drop: what still counts as the final level
CONVERGED, PLATEAU = 0.15, 0.6  # shares of the run that lie at the final level
UNMOVED = 0.02  # of the first loss
OSCILLATION = (0.1, 0.25)  # wobble, as shares of the loss and of its drop
MEMORIZED = 0.1  # nats a token: each trained token is given a probability of 0.9
GAP = 0.3  # nats a token: held-out perplexity 1.35 times that of training
RISE = 0.02  # of the lowest evaluation loss


def judge(train: Curve, evaluation: Curve, grad_norm: Curve) -> list[Verdict]:
    """The verdicts on a run's loss, evaluation loss and gradient norm; the worst come first."""
    found = [*_broken({"loss": train, "evaluation loss": evaluation, "gradient norm": grad_norm})]
    train, evaluation = finite(train), finite(evaluation)
    if len(train) < LEAST:
        evidence, help = f"{len(train)} logged losses; {LEAST} are needed", "train on, or lower logging_steps"
        found.append(Verdict(LOOK, "too short", "Too few losses to judge.", evidence, help))
    else:
        shape = _Shape(train)
        course, bouncing = [*_course(shape)], [*_oscillation(shape)]
        learned = all(verdict.severity != FAULT for verdict in course + found)
        if not (learned and bouncing):  # phases cannot be told from swings
            found += course
        found += [*bouncing, *_memorization(shape, evaluation, learned)]
    return sorted(found, key=lambda verdict: (FAULT, LOOK, GOOD).index(verdict.severity))


def of_evaluation_rows(rows: int, trained_on: int | None, foreign: str) -> list[Verdict]:
    """The verdicts on rows that a run was evaluated on: whether they were held out, and of its own data.

    Args:
        trained_on: how many of the rows were trained on too; None where that is not known.
        foreign: the set, where it came with other training data than the run's.
    """
    found = []
    if trained_on:
        what, evidence = "Rows that it is evaluated on are trained on too.", f"{trained_on:,} of {rows:,} rows"
        help = "remove the copies from one of the sets (check.py --audit names them), or test_split_size"
        found.append(Verdict(LOOK, "not held out", what, evidence, help))
    if foreign:
        what, help = "It is evaluated on rows that came with other data.", "eval_dataset_name, or test_split_size"
        found.append(Verdict(LOOK, "foreign evaluation", what, f"evaluated on {foreign}", help))
    return found


class _Shape:
    """Levels of a noisy curve: where it starts and ends, its lowest, its wobble (all nats a token)."""

    def __init__(self, curve: Curve):
        self.steps, self.values = list(curve), list(curve.values())
        count = len(self.values)
        self.window = max(3, count // 10)
        half = self.window // 2
        self.smooth = [fmean(self.values[max(0, i - half) : i + half + 1]) for i in range(count)]
        self.start = fmean(self.values[: max(1, min(10, count // 30))])
        self.end = fmean(self.values[-self.window :])
        self.lowest = min(range(count), key=self.smooth.__getitem__)
        self.low = self.smooth[self.lowest]
        late = self.values[count // 2 :]
        self.level, self.wobble = fmean(late), _about_a_line(late)
        self.error = self.wobble / math.sqrt(self.window)  # standard error of a level
        self.drop = self.start - self.end

    def knee(self) -> int:
        """The point farthest below the chord from first to last loss (Satopää et al., 2011, Kneedle)."""
        last = len(self.smooth) - 1
        return min(range(last + 1), key=lambda i: self.smooth[i] - (self.start - self.drop * i / last))

    def flat_from(self) -> int:
        """The first point from which on the curve stays at its final level."""
        tolerance = max(2 * self.error, FLAT * self.drop)
        away = [i for i, value in enumerate(self.smooth) if abs(value - self.end) > tolerance]
        return min(away[-1] + 1, len(self.smooth) - 1) if away else 0


def _about_a_line(values: list[float]) -> float:
    """Standard deviation about the least-squares line."""
    middle, mean = (len(values) - 1) / 2, fmean(values)
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    return math.sqrt(fmean((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(values)))


def _broken(curves: dict[str, Curve]) -> Iterator[Verdict]:
    """The first value that is no number, of the first curve that has one."""
    for name, curve in curves.items():
        bad = [step for step, value in curve.items() if not math.isfinite(value)]
        if bad:
            what, evidence = f"The {name} is no number.", f"{name} {curve[bad[0]]} at step {bad[0]}"
            help = "a third of learning_rate, longer warmup_steps, max_grad_norm: 1.0; bf16 or fp32 in place of fp16"
            yield Verdict(FAULT, "diverged", what, evidence, help, {"step": bad[0], "values": len(bad)})
            return


def _course(s: _Shape) -> Iterator[Verdict]:
    """Divergence, or the three phases of a loss that falls: sharp drop, stabilization, convergence."""
    moved = max(2 * s.error, UNMOVED * s.start)
    figures = {"start": s.start, "lowest": s.low, "end": s.end}
    gained, lost = s.start - s.low, s.end - s.low
    if -s.drop > moved or (lost > gained / 2 and lost > 2 * s.wobble):
        evidence = f"{s.start:.3f} at the start, lowest {s.low:.3f} near step {s.steps[s.lowest]}, {s.end:.3f} last"
        help = "a third of learning_rate, longer warmup_steps, max_grad_norm: 1.0"
        yield Verdict(FAULT, "diverged", "The loss grew.", evidence, help, figures)
        return
    if s.drop <= moved:
        evidence = f"{s.start:.3f} at the start, {s.end:.3f} at the end; single steps vary by ±{s.wobble:.3f}"
        help = "a higher learning_rate; see with check.py --show 3 whether the right tokens are trained"
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
    figures |= {"knee": s.steps[knee], "level_since": s.steps[flat], "level_share": share}
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
        late = s.values[len(s.values) // 2 :]
        leap = max(abs(b - a) for a, b in pairwise(late))
        evidence = f"±{s.wobble:.3f} about {s.level:.3f} in the second half, up to {leap:.3f} from step to step"
        help = "a lower learning_rate, or a larger global_batch_size"
        figures = {"wobble": s.wobble, "level": s.level, "largest_leap": leap}
        yield Verdict(LOOK, "oscillation", "The loss bounces up and down.", evidence, help, figures)


def _memorization(s: _Shape, evaluation: Curve, learned: bool) -> Iterator[Verdict]:
    """Train-to-zero, an evaluation loss that rises again, and the gap between the two losses."""
    if s.end < MEMORIZED:
        evidence = f"{s.end:.4f} nats a token: each is given a probability of {math.exp(-s.end):.1%}"
        help = "fewer epochs, a lower learning_rate, more rows; ask it what is not in the data"
        what = "The training loss went to zero: the rows are known by heart."
        yield Verdict(FAULT, "memorized", what, evidence, help, {"end": s.end})
    if not evaluation:
        what, evidence = "Nothing was held out, so nothing tells learning from memorizing.", "no evaluation loss"
        yield Verdict(LOOK, "not evaluated", what, evidence, "eval_dataset_name and eval_strategy: epoch")
        return
    best = min(evaluation, key=evaluation.__getitem__)
    low, end, last = evaluation[best], list(evaluation.values())[-1], list(evaluation)[-1]
    gap = end - s.end
    figures = {"best": low, "best_step": best, "end": end, "gap": gap}
    if end - low > RISE * low:
        evidence = f"lowest at step {best} with {low:.3f}, {end:.3f} at step {last}"
        help = f"stop near step {best}: fewer epochs; or lora_dropout, weight_decay, more rows"
        yield Verdict(FAULT, "overfitting", "The evaluation loss rises again.", evidence, help, figures)
    if gap > GAP:
        evidence = f"{end:.3f} held out, {s.end:.3f} in training: perplexity {math.exp(min(gap, 50)):.2f} times as high"
        help = "fewer epochs, more or more varied rows; compare.py shows whether the answers are still good"
        yield Verdict(LOOK, "gap", "The held-out loss lies far above the training loss.", evidence, help, figures)
    elif learned and end - low <= RISE * low:
        evidence = f"{end:.3f} held out, {s.end:.3f} in training: {gap:+.3f}"
        yield Verdict(GOOD, "generalizes", "What was learned holds on rows not trained on.", evidence, figures=figures)
