"""Which of several runs is the best by held-out loss, and whether that is more than chance."""

from __future__ import annotations

import math
from pathlib import Path

from stepladder import files, installation
from stepladder.errors import GOOD, LEVEL, LOOK, Verdict
from stepladder.evaluation import metrics
from stepladder.evaluation.held_out import RowLoss
from stepladder.manifest import HELD_OUT_LOSSES
from stepladder.reporting.runs import LoggedRun

SAME = 1e-3  # by which the mean of the rows' losses may differ from the logged one, relative: fp32 sums, other order
COMPARED = 20  # the nearest runs that the best one is tested against
ROWS = 100_000_000  # runs × rows: of more, the tests would take minutes


def choose_run(runs: list[LoggedRun]) -> Verdict | None:
    """The verdict on several runs; None on one, and where none of them has evaluated.

    Runs that failed, or were stopped earlier than others, are no candidates. Runs are compared row by row where
    held_out_losses.json has the rows' losses: a paired bootstrap and permutation test, corrected for the number of
    runs (Holm). What differs between two seeds is not in it.
    """
    evaluated = [run for run in runs if len(run.curve("eval_loss").finite())]
    if len(runs) < 2 or not evaluated:
        return None
    finished = [run for run in evaluated if run.facts.get("status") == "finished" and _final(run) is not None]
    if not finished:
        return Verdict(LOOK, "no best run", "No run has finished with a held-out loss.", _left_out(runs, []))
    finished.sort(key=lambda run: _final(run) or 0.0)
    best, others = finished[0], finished[1:]
    if fault := _not_comparable(finished):
        return Verdict(LOOK, "no best run", fault, f"lowest: {best.name}, {_final(best):.4f} nats per token",
                       "one eval_dataset_name for all, or the same seed and data with test_split_size")  # fmt: skip
    losses = {run.name: _row_losses(run) for run in finished}
    mean, low, high = _interval(losses[best.name])
    evidence = f"held-out loss {_final(best):.4f}"
    evidence += f" [{low:.4f}, {high:.4f}]" if math.isfinite(mean) else ""
    evidence += _left_out(runs, finished)
    if not others:
        return Verdict(
            GOOD, "best run", f"{best.name} is the only run that has finished with a held-out loss.", evidence
        )
    near = others[: max(1, min(COMPARED, ROWS // (metrics.RESAMPLES * max(1, len(losses[best.name])))))]
    tests = {run.name: _compare(losses[best.name], losses[run.name]) for run in near}
    known = [found for found in tests.values() if found]
    if len(known) < len(tests):
        what = f"{best.name} has the lowest held-out loss; whether by more than chance is not known."
        help = f"the runs lack {HELD_OUT_LOSSES}: train them again, or {installation.command('compare')} on the two"
        return Verdict(LOOK, "best run", what, f"{evidence}; next: {near[0].name}, {_final(near[0]):.4f}", help)
    corrected = dict(zip(tests, metrics.holm([found.p for found in known]), strict=True))
    ties = [name for name, p in corrected.items() if p >= LEVEL]
    first = known[0]
    evidence += f"; next: {near[0].name}, {first.mean:+.4f} [{first.low:+.4f}, {first.high:+.4f}] by row"
    if ties:
        what = f"{best.name} has the lowest held-out loss, and cannot be distinguished from {_listed(ties)}."
        help = "the cheapest of them; or more held-out rows, which make the interval narrower"
        return Verdict(LOOK, "no clear best run", what, evidence, help)
    what = f"{best.name} is the best by held-out loss, by more than chance."
    return Verdict(GOOD, "best run", what, evidence, "another seed may differ by more than the interval: try two")


def _final(run: LoggedRun) -> float | None:
    """The held-out loss of a run's result."""
    loss = (run.facts.get("final") or {}).get("eval_loss")
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None


def _left_out(runs: list[LoggedRun], finished: list[LoggedRun]) -> str:
    """Which runs are no candidates, and why."""
    rest = [f"{run.name} ({run.facts.get('status', 'unknown')} at step {run.last_step or 0})"
            for run in runs if run not in finished]  # fmt: skip
    return "; no candidates: " * bool(finished and rest) + _listed(rest)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def _not_comparable(runs: list[LoggedRun]) -> str:
    """Why the runs' held-out losses do not compare; empty where they do."""
    rows = {((run.facts.get("inputs") or {}).get("evaluation_rows") or {}).get("rows") for run in runs}
    if len(rows - {None}) > 1:
        return "The runs were evaluated on different rows, so their losses do not compare."
    if len(rows) > 1:
        return (
            "On which rows some of the runs were evaluated is not known (older runs), so their losses do not compare."
        )
    held_out = [run.facts.get("held_out") or {} for run in runs]
    if all(one and one["rows"] == one["trained_on"] for one in held_out):
        return "All rows that the runs were evaluated on are trained on too."
    return ""


def _row_losses(run: LoggedRun) -> dict[int, RowLoss]:
    """The rows' losses of a run's result; empty where they are not kept, or are of another step."""
    try:
        found = files.read_object(Path(run.folder) / HELD_OUT_LOSSES)
        rows = zip(found["rows"], found["nats"], found["tokens"], strict=True)
        losses = {int(row): RowLoss(float(nats), int(tokens)) for row, nats, tokens in rows}
        mean = sum(one.nats for one in losses.values()) / sum(one.tokens for one in losses.values())
        if min(one.tokens for one in losses.values()) < 1:
            return {}
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError):
        return {}
    final = _final(run)
    return losses if final is not None and abs(mean - final) <= SAME * max(abs(final), 1e-6) else {}


def _interval(losses: dict[int, RowLoss]) -> tuple[float, float, float]:
    if not losses:
        return math.nan, math.nan, math.nan
    tokens = [one.tokens for one in losses.values()]
    return metrics.interval([one.nats / one.tokens for one in losses.values()], tokens)


def _compare(first: dict[int, RowLoss], second: dict[int, RowLoss]) -> metrics.Difference | None:
    """The second's loss minus the first's on the same rows; None where those are not known."""
    if not first or {row: one.tokens for row, one in first.items()} != {row: one.tokens for row, one in second.items()}:
        return None
    tokens = [one.tokens for one in first.values()]
    before, after = ([one[row].nats / one[row].tokens for row in first] for one in (first, second))
    return metrics.compare_paired(before, after, tokens)
