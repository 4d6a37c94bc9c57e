"""A base and what was made of it, on the same questions and rows: figures, what differs beyond chance, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepladder.errors import BETTER, FAULT, LEVEL, LOOK, NO_DIFFERENCE, WORSE, Verdict
from stepladder.evaluation import behaviours, metrics, verdicts
from stepladder.evaluation.held_out import RowLoss, mean_loss
from stepladder.evaluation.metrics import HIGHER, NEITHER, Metric, StyleRule
from stepladder.evaluation.questions import Answer, Question

Column = list[float | None]  # a value a row; None where the metric says nothing of it


@dataclass
class Side:
    """What one model said and how well it predicts the answers that it did not say.

    `losses` are of the rows compared on, which are held out unless the comparison says otherwise, `general` of
    general knowledge, `training` of rows that each tuned side (by its name) was trained on; empty where not
    measured (a server or a transcript tells no losses).
    """

    name: str
    answers: list[Answer] = field(default_factory=list)
    losses: list[RowLoss] = field(default_factory=list)
    general: list[RowLoss] = field(default_factory=list)
    training: dict[str, list[RowLoss]] = field(default_factory=dict)
    tried: behaviours.Tried | None = None  # the suite of behaviours, where it was asked

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


def build_comparison(
    sides: list[Side],
    questions: list[Question],
    rules: list[StyleRule],
    trained: dict[str, verdicts.TrainedAnswers],
    on_training: bool = False,
) -> dict[str, Any]:
    """Figures and verdicts, as JSON can hold them; `on_training` where each row was trained on."""
    compared = tabulate(sides, questions, rules, on_training)
    judged = judge_sides(sides, questions, trained, rules, on_training)
    for number, found in enumerate(judged, start=1):
        verdict = behaviours.verdict(compared["metrics"], number)
        if verdict and not any(other["name"] == "diverged" for other in found["verdicts"]):
            found["verdicts"].append(vars(verdict))
    return as_json(compared | {"verdicts": judged})


def tabulate(
    sides: list[Side], questions: list[Question], rules: list[StyleRule], on_training: bool = False
) -> dict[str, Any]:
    """The first side against each of the others.

    `metrics` holds a row a figure: each side's mean with its 95 % interval, and each later side's test
    against the first. All p values of a side are corrected together (Holm).
    """
    columns = [_columns(side, questions, rules) for side in sides]
    rows = []
    if any(side.losses for side in sides):
        rows += _loss_rows(sides, on_training)
    for metric in dict.fromkeys(metric for side in columns for metric in side):
        row = _row(metric, [side.get(metric, []) for side in columns])
        rows += [row] if any(row["sides"]) else []
    for n in (1, 2):
        shares = [_distinct(side.texts, n) if side.answers else None for side in sides]
        rows += [_entry(Metric(f"distinct-{n}", NEITHER, "share"), shares)] if any(shares) else []
    _judge(rows, [side.name for side in sides])
    rows += _behaviour_rows(sides)
    return {
        "on_training_rows": on_training,
        "questions": [question.text for question in questions],
        "references": [question.reference for question in questions],
        "sides": [_facts(side, sides[0]) for side in sides],
        "metrics": rows,
    }


def judge_sides(
    sides: list[Side],
    questions: list[Question],
    trained: dict[str, verdicts.TrainedAnswers],
    rules: Sequence[StyleRule] = (),
    on_training: bool = False,
) -> list[dict[str, Any]]:
    """Each later side's verdicts against the first: better, learned by heart, forgotten, as far as measured.

    And whether it keeps the rules that are required. `trained` holds the answers that a side was trained on, by
    its name, where they are known. With `on_training` no row is held out, so that nothing is called better.
    """
    base, *others = sides
    found = []
    for side in others:
        judged = [*_verdicts(base, side, questions, trained.get(side.name), on_training)]
        judged += [] if any(verdict.name == "diverged" for verdict in judged) else _required(side, questions, rules)
        found.append({"side": side.name, "verdicts": [vars(verdict) for verdict in judged]})
    return found


def _verdicts(
    base: Side, tuned: Side, questions: list[Question], trained: verdicts.TrainedAnswers | None, on_training_rows: bool
) -> Iterator[Verdict]:
    for side in (tuned, base):
        on_training = side.training.get(tuned.name, [])
        if verdict := verdicts.judge_divergence([*side.losses, *side.general, *on_training], side.name):
            yield verdict
            return
    if on_training_rows:
        yield from verdicts.judge_training_rows(base.losses, tuned.losses)
    elif base.losses and tuned.losses:
        yield verdicts.judge_improvement(base.losses, tuned.losses)
    if trained and not on_training_rows:  # which the references of training rows are copies of
        before, after = (side.training.get(tuned.name, []) for side in (base, tuned))
        losses = None
        if before and after and base.losses and tuned.losses:
            held_out = mean_loss(base.losses), mean_loss(tuned.losses, base.losses)
            losses = (mean_loss(before), mean_loss(after, before)), held_out
        if losses or tuned.texts:
            yield verdicts.judge_memorization(
                trained, tuned.texts, [question.reference for question in questions], losses
            )
    if base.general and tuned.general:
        yield verdicts.judge_forgetting(base.general, tuned.general)


def _required(side: Side, questions: list[Question], rules: Sequence[StyleRule]) -> Iterator[Verdict]:
    """The rules that too few answers keep, and those that no answer could be held to."""
    missed, unknown, figures = [], [], {}
    for rule in rules:
        if rule.required is None or not side.answers:
            continue
        kept = [rule.kept(text, q.reference) for text, q in zip(side.texts, questions, strict=True)]
        known = [value for value in kept if value is not None]
        share = sum(known) / len(known) if known else None
        if share is None:
            unknown.append(f"{rule.name}: no reference holds it")
        elif share < rule.required - 1e-9:  # nine of ten are 0.9, however they are added up
            missed.append(
                f"{rule.name} in {100 * share:.3g}% of the answers, at least {100 * rule.required:g}% required"
            )
            figures[rule.name] = share
    if missed:
        what, help = "Its answers keep a required rule too rarely.", "more rows that show it; facts from a lookup"
        yield Verdict(FAULT, "requirement missed", what, "; ".join(missed), help, figures)
    if unknown:
        what, help = "Nothing shows whether a required rule is kept.", "--data with answers that have it"
        yield Verdict(LOOK, "requirement not judged", what, "; ".join(unknown), help)


def _columns(side: Side, questions: list[Question], rules: list[StyleRule]) -> dict[Metric, Column]:
    found: dict[Metric, Column] = {}
    for answer, question in zip(side.answers, questions, strict=bool(side.answers)):
        figures = metrics.score_answer(answer, question.reference)
        for rule in rules:
            metric = Metric(rule.name, HIGHER, "share of answers", rule.required, rule.facts)
            figures[metric] = rule.kept(answer.text, question.reference)
        for metric, value in figures.items():
            found.setdefault(metric, []).append(value)
    return found


def _row(metric: Metric, columns: list[Column]) -> dict[str, Any]:
    """The means of a metric, and its tests over the rows of which it says something."""
    sides, tests = [], []
    for column in columns:
        known = [value for value in column if value is not None]
        sides.append(_mean(known, [1.0] * len(known)) if known else None)
        pairs = [(a, b) for a, b in zip(columns[0], column, strict=False) if a is not None and b is not None]
        wanted = pairs and metric.better != NEITHER and column is not columns[0]
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        tests.append(vars(metrics.compare_paired(first, second, [1.0] * len(pairs))) if wanted else None)
    return _entry(metric, sides, tests)


def _behaviour_rows(sides: list[Side]) -> list[dict[str, Any]]:
    """A row a behaviour, and one of all that the base could, with the noise floor of each.

    Their p values are corrected among themselves: the suite is its own question. That of all together is one test.
    """
    base, names = sides[0].tried, [side.name for side in sides]
    if base is None:
        return []
    columns = [behaviours.columns(side.tried, base) for side in sides]
    rows = [_row(Metric(name, HIGHER, "share"), [side.get(name, []) for side in columns])
            | {"noise": behaviours.noise(base, name)} for name in columns[0]]  # fmt: skip
    together = [row for row in rows if row["name"] == behaviours.ALL]
    for family in ([row for row in rows if row not in together], together):
        _judge(family, names)
    return rows


def _loss_rows(sides: list[Side], on_training: bool) -> list[dict[str, Any]]:
    """The loss, and the perplexity: e to the loss and to its interval."""
    base = next(side.losses for side in sides if side.losses)
    weights = [float(row.tokens) for row in base]
    means = [_mean([a.nats / b.tokens for a, b in zip(side.losses, base, strict=True)], weights)
             if side.losses else None for side in sides]  # fmt: skip
    tests = [vars(verdicts.loss_test(sides[0].losses, side.losses)) if sides[0].losses and side.losses else None
             for side in sides[1:]]  # fmt: skip
    powers = [mean and {key: math.exp(min(value, 700)) for key, value in mean.items() if key != "rows"}
              for mean in means]  # fmt: skip
    loss = _entry(metrics.TRAINING_LOSS if on_training else metrics.LOSS, means, [None, *tests])
    return [loss, _entry(Metric("perplexity", NEITHER, "a token"), powers)]


def _mean(values: list[float], weights: list[float]) -> dict[str, float]:
    mean, low, high = metrics.interval(values, weights)
    return {"mean": mean, "low": low, "high": high, "rows": len(values)}


def _distinct(texts: list[str], n: int) -> dict[str, float]:
    mean = metrics.distinct(texts, n)
    low, high = metrics.jackknife(mean, metrics.distinct_without(texts, n))
    return {"mean": mean, "low": max(low, 0.0), "high": min(high, 1.0), "rows": len(texts)}


def _entry(metric: Metric, sides: list[Any], tests: list[Any] | None = None) -> dict[str, Any]:
    return {**metric._asdict(), "sides": sides, "tests": tests or [None] * len(sides)}


def _judge(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Add to each test its corrected p and its verdict, and to each row its winner."""
    for number in range(1, len(names)):
        tests = [(row, test) for row in rows if (test := row["tests"][number])]
        for (row, test), p in zip(tests, metrics.holm([test["p"] for _, test in tests]), strict=True):
            rose = (test["mean"] > 0) == (row["better"] == HIGHER)
            test["p_corrected"] = p
            test["verdict"] = NO_DIFFERENCE if p >= LEVEL else BETTER if rose else WORSE
            of_base, mean = (row["sides"][side]["mean"] for side in (0, number))
            if math.isfinite(of_base) and not math.isfinite(mean):
                test["verdict"] = WORSE
            if test["verdict"] == WORSE and -test["mean"] <= row.get("noise", -math.inf):
                test["verdict"] = NO_DIFFERENCE
    for row in rows:
        row["winner"] = _winner(row, names)


def _winner(row: dict[str, Any], names: list[str]) -> str:
    """The best of the sides that are better than the base; the base where all the others are worse."""
    tests = [(test["mean"], name, test["verdict"]) for test, name in zip(row["tests"], names, strict=True) if test]
    if not tests:
        return "–"
    if better := [(mean, name) for mean, name, verdict in tests if verdict == BETTER]:
        return (max if row["better"] == HIGHER else min)(better)[1]
    return names[0] if all(verdict == WORSE for *_, verdict in tests) else NO_DIFFERENCE


def _facts(side: Side, base: Side) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": side.name, "answers": side.texts}
    facts["stopped"] = [answer.stopped for answer in side.answers]
    if side.losses:
        facts["tokens"] = sum(row.tokens for row in side.losses)
    for key, mine, reference in (
        ("loss", side.losses, base.losses),
        ("general_loss", side.general, base.general),
        ("training_loss", side.training.get(side.name), base.training.get(side.name)),
    ):
        if mine:
            facts[key] = mean_loss(mine, reference or None)
    if tried := side.tried:
        facts["behaviours"] = [
            {"behaviour": task.behaviour, "question": task.question.text, "answer": answer, "kept": kept}
            for task, answer, kept in zip(tried.tasks, tried.answers, tried.kept, strict=True)
        ]
    return facts


def as_json(value: Any) -> Any:
    """A value as JSON can hold it: None for what is no number."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
