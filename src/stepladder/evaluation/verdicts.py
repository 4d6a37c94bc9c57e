"""Verdicts on a tuned model, each with its evidence, and the claims that must hold of it (`compare.py --require`).

Better, or learned by heart? Forgotten what it knew? A claim is such a verdict, a figure that is better or not worse,
or that no behaviour was lost. A claim that was not measured does not hold, nor does one that no answer could have
broken (too few rows, a figure that is 0 already).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from stepladder.errors import BETTER, FAULT, GOOD, LEVEL, LOOK, WORSE, StepladderError, Verdict
from stepladder.evaluation import behaviours, metrics
from stepladder.evaluation.held_out import RowLoss, mean_loss
from stepladder.evaluation.metrics import HIGHER, NEITHER, StyleRule, words
from stepladder.reporting.curves import GAP, MEMORIZED
from stepladder.suggest import suggest

SEED_WORDS = 4  # a run of fewer common words is chance, and is not looked for
COPIED = (8, 0.5)  # words, and share of the answer, that a run must have for the answer to be a copy
COPIES = 0.25  # share of copies above that of the references: a house's set phrases are in every good answer
HALF_KNOWN = 0.7  # nats per token: each token of a training answer is given a probability of 0.5
WIDE_GAP = 1.0  # nats per token, beyond the base's: perplexity 2.7 times that on training rows
RISE, LOUD_RISE = 0.05, 0.3  # nats per token on general knowledge
NOT_WORSE, BEHAVES, FORGET = "not worse", "behaves", "did not forget"
# The verdicts that can be required; those that are given in their place; and what they are drawn from.
VERDICTS = {
    "better than the base": (
        ("no difference shown", "worse than the base"),
        "both sides must tell the loss on held-out rows (models, and --data)",
    ),
    "not memorized": (("memorized", "gap"), "the rows that it was trained on must be known (a run folder)"),
    FORGET: (
        ("forgot", "forgot a little"),
        "both sides must tell the loss on general knowledge (models, and rows of --general not trained on)",
    ),
}
SHORT = {BETTER: "better than the base"}
INSTEAD = ("diverged", "not held out")  # verdicts beside which others are not given


class TrainedAnswers:
    """The answers that a model was trained on, to find runs of words of theirs in other texts."""

    def __init__(self, answers: Iterable[str]):
        self.texts = [words(text) for text in answers]
        self.places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            for start in range(len(text) - SEED_WORDS + 1):
                self.places[tuple(text[start : start + SEED_WORDS])].append((number, start))

    def longest_run(self, text: str) -> int:
        """The most consecutive words that the text has in common with one training answer; 0 below four."""
        mine, longest = words(text), 0
        for start in range(len(mine) - SEED_WORDS + 1):
            for number, at in self.places.get(tuple(mine[start : start + SEED_WORDS]), ()):
                length = SEED_WORDS
                for here, there in zip(mine[start + length :], self.texts[number][at + length :], strict=False):
                    if here != there:
                        break
                    length += 1
                longest = max(longest, length)
        return longest

    def share_of_copies(self, texts: list[str]) -> tuple[float, int]:
        """The share of texts that are copies of a training answer, and the longest run of all."""
        runs = [self.longest_run(text) for text in texts]
        least, share = COPIED
        copies = [run >= max(least, share * len(words(text))) for run, text in zip(runs, texts, strict=True)]
        return sum(copies) / max(len(texts), 1), max(runs, default=0)


def judge_divergence(losses: list[RowLoss], whose: str) -> Verdict | None:
    """The verdict on a model with a NaN loss; no other verdict holds then."""
    bad = sum(not math.isfinite(row.nats) for row in losses)
    evidence = f"of {whose}, on {bad} of {len(losses)} rows"
    help = "see where its weights became NaN: the run's curves; a third of learning_rate, max_grad_norm: 1.0"
    figures = {"rows": float(bad), "of": float(len(losses))}
    return Verdict(FAULT, "diverged", "Its loss is not a number.", evidence, help, figures) if bad else None


def judge_memorization(
    trained: TrainedAnswers,
    answers: list[str],
    references: list[str],
    losses: tuple[tuple[float, float], tuple[float, float]] | None,
) -> Verdict:
    """Whether the answers to questions not trained on, or the losses, show training answers known by heart.

    Args:
        losses: on training rows, of the base and of the tuned model, and on held-out rows; where a side
            tells none, the copies alone are judged by.
    """
    share, run = trained.share_of_copies(answers)
    usual, _ = trained.share_of_copies([text for text in references if text])
    figures = {"copied": share, "copied_references": usual, "longest_run": float(run)}
    evidence = (
        f"{share:.0%} of the answers are copies of a training answer (of the references {usual:.0%}), longest common "
        f"run {run} words"
    )
    known, gap = False, 0.0
    if losses:
        on_training, held_out = losses
        gap = (held_out[1] - on_training[1]) - (held_out[0] - on_training[0])
        known = on_training[1] < (HALF_KNOWN if gap > WIDE_GAP else MEMORIZED)
        figures |= {"training_loss": on_training[1], "held_out_loss": held_out[1], "gap": gap}
        evidence += (
            f"; loss {on_training[1]:.3f} on training rows, {held_out[1]:.3f} held out, a gap {gap:+.3f} "
            "beyond the base's"
        )
    help = "fewer epochs, a lower learning_rate, more and more varied rows, lora_dropout or weight_decay"
    if known or share > usual + COPIES:
        return Verdict(FAULT, "memorized", "It knows training answers by heart.", evidence, help, figures)
    if gap > GAP:
        what = "It does better on the rows that it was trained on."
        return Verdict(LOOK, "gap", what, evidence, help, figures)
    return Verdict(GOOD, "not memorized", "It answers in words of its own.", evidence, figures=figures)


def judge_forgetting(base: list[RowLoss], tuned: list[RowLoss]) -> Verdict:
    """Whether the loss on general knowledge, which was not trained on, has risen."""
    before, after = mean_loss(base), mean_loss(tuned, base)
    test = loss_test(base, tuned)
    rise, figures = after - before, {"before": before, "after": after, "p": test.p, "rows": float(len(base))}
    evidence = f"general knowledge: {before:.3f} before, {after:.3f} after ({rise:+.3f}, p = {test.p:.2g})"
    help = "mix_general: 0.1, a lower learning_rate, fewer epochs, or LoRA where it was full fine-tuning"
    if rise > RISE and test.p < LEVEL:
        times = f"; perplexity {math.exp(min(rise, 50)):.2f} times as high"
        severity, name = (FAULT, "forgot") if rise > LOUD_RISE else (LOOK, "forgot a little")
        return Verdict(severity, name, "It knows less than its base did.", evidence + times, help, figures)
    return Verdict(GOOD, "did not forget", "It knows what its base knew.", evidence, figures=figures)


def judge_training_rows(base: list[RowLoss], tuned: list[RowLoss]) -> Iterator[Verdict]:
    """What a comparison on training rows alone shows: rows known by heart, and nothing of others."""
    what, help = "Each row was trained on, so nothing shows what it does on others.", "--data with other rows"
    evidence, figures = "no row was held out", {}
    if base and tuned:
        before, after = mean_loss(base), mean_loss(tuned, base)
        figures = {"before": before, "after": after}
        evidence = f"loss on training rows {before:.3f} before, {after:.3f} after, on {len(base)} rows"
        if after < MEMORIZED:
            known = "fewer epochs, a lower learning_rate, more and more varied rows"
            yield Verdict(FAULT, "memorized", "It knows training answers by heart.", evidence, known, figures)
    yield Verdict(LOOK, "not held out", what, evidence, help, figures)


def judge_improvement(base: list[RowLoss], tuned: list[RowLoss]) -> Verdict:
    """Whether the held-out loss fell by more than chance."""
    before, after, test = mean_loss(base), mean_loss(tuned, base), loss_test(base, tuned)
    figures = {"before": before, "after": after, "p": test.p}
    evidence = f"held-out loss {before:.3f} before, {after:.3f} after, on {len(base)} rows (p = {test.p:.2g})"
    if test.p >= LEVEL:
        what, help = "The held-out loss shows no difference to the base.", "more held-out rows; train longer"
        return Verdict(LOOK, "no difference shown", what, evidence, help, figures)
    if after > before:
        what, help = "It predicts held-out answers worse than its base.", "see the verdicts on the run's curves"
        return Verdict(FAULT, "worse than the base", what, evidence, help, figures)
    return Verdict(GOOD, "better than the base", "It predicts held-out answers better.", evidence, figures=figures)


def loss_test(base: list[RowLoss], tuned: list[RowLoss]) -> metrics.Difference:
    """The test of two models' losses on the same rows; each row weighs what its tokens are to the base."""
    weights = [float(row.tokens) for row in base]
    first, second = ([row.nats / unit.tokens for row, unit in zip(side, base, strict=True)] for side in (base, tuned))
    return metrics.compare_paired(first, second, weights)


class Claim(NamedTuple):
    """`subject` is a verdict's or figure's name, or `behaves`; `wanted` is BETTER or NOT_WORSE of a figure."""

    subject: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"{self.subject} {self.wanted}".strip()


def read_claims(texts: Sequence[str], rules: Sequence[StyleRule]) -> list[Claim]:
    """The claims of a comma-separated list, each once.

    Args:
        texts: what each --require says.
        rules: the rubric's, whose names are figures.

    Raises:
        StepladderError: there is none, or nothing of that name can be required.
    """
    possible = [Claim(name, wanted) for name in _figures(rules) for wanted in (BETTER, NOT_WORSE)]
    possible += [Claim(BEHAVES), *map(Claim, VERDICTS)]
    known = {_plain(str(claim)): claim for claim in possible} | {short: Claim(name) for short, name in SHORT.items()}
    claims: list[Claim] = []
    for text in texts:
        # a rule's name may hold a comma: then its claim is a --require of its own
        for part in [text] if _plain(text) in known else text.split(","):
            name = _plain(part)
            claim = known.get(name)
            if name and claim is None:
                raise StepladderError(
                    f"{part.strip()[:60]!r} is nothing that can be required",
                    where="--require",
                    why=suggest(name, known),
                    help=_listed(rules),
                )
            claims += [claim] if claim else []
    if texts and not claims:
        raise StepladderError("it requires nothing", where="--require", help=_listed(rules))
    return [*dict.fromkeys(claims)]


def _figures(rules: Sequence[StyleRule]) -> list[str]:
    own = [metric.name for metric in metrics.METRICS if metric.better != NEITHER]
    return [metrics.LOSS.name, *own, *(rule.name for rule in rules), *behaviours.CHECKS, behaviours.ALL]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _listed(rules: Sequence[StyleRule]) -> str:
    verdicts = ", ".join([*SHORT, *(name for name in VERDICTS if name not in SHORT.values()), BEHAVES])
    more = "" if rules else "; with --rubric its rules too"
    return f"{verdicts}; and of each of these '… better' or '… not worse': {', '.join(_figures(rules))}{more}"


def needs_behaviours(claims: Sequence[Claim]) -> bool:
    """Whether the suite of behaviours must be asked: forgetting is more than a loss on general knowledge."""
    return any(claim.subject in (BEHAVES, FORGET, behaviours.ALL, *behaviours.CHECKS) for claim in claims)


def judge_claims(claims: Sequence[Claim], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim of each tuned side: whether it holds (`met`), and the evidence.

    Args:
        facts: a comparison, as compare.json holds it.
    """
    found = []
    for number, judged in enumerate(facts["verdicts"], start=1):
        verdicts = {verdict["name"]: verdict for verdict in judged["verdicts"]}
        behaved = behaviours.verdict(facts["metrics"], number)
        for claim in claims:
            if claim.wanted:  # a rule of a rubric may have the name of another figure: then both must hold
                rows = [row for row in facts["metrics"] if row["name"].casefold() == claim.subject.casefold()]
                each = [_row(claim.wanted, row, facts["metrics"], number) for row in rows]
                met = bool(each) and all(holds for holds, _ in each)
                evidence = "; ".join(why for _, why in each) or "not measured"
            elif claim.subject != BEHAVES:
                met, evidence = _verdict(claim.subject, verdicts)
                if claim.subject == FORGET and met and behaved:  # beside the loss; a base that could none loses none
                    met, evidence = behaved.severity != FAULT, f"{evidence}; {behaved.name}: {behaved.evidence}"
            elif behaved is None:
                met, evidence = False, "not measured: both sides must be models"
            else:
                met = behaved.severity == GOOD
                evidence = f"{behaved.name}: {behaved.what} " * (not met) + behaved.evidence
            found.append({"side": judged["side"], "claim": str(claim), "met": met, "evidence": evidence})
    return found


def _verdict(name: str, verdicts: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    others, needs = VERDICTS[name]
    verdict = next((verdicts[one] for one in (name, *others, *INSTEAD) if one in verdicts), None)
    if verdict is None:
        return False, f"not measured: {needs}"
    if verdict["name"] != name:
        return False, f"{verdict['name']}: {verdict['evidence']}"
    rows = verdict["figures"].get("rows")
    if name == FORGET and rows is not None and not metrics.can_differ(int(rows)):
        return False, f"{int(rows)} rows of general knowledge are too few to show forgetting"
    return True, verdict["evidence"]


def _row(wanted: str, row: dict[str, Any], table: list[dict[str, Any]], number: int) -> tuple[bool, str]:
    base, side, test = row["sides"][0], row["sides"][number], row["tests"][number]
    if not (base and side and test):
        return False, "not measured on both sides"
    if base["mean"] is None or side["mean"] is None:
        return False, "a side's figure is not a number"
    percent = row["unit"].startswith("share")
    before, after = (f"{one['mean']:.0%}" if percent else f"{one['mean']:.3f}" for one in (base, side))
    more = f", noise {row['noise']:.0%}" if "noise" in row else ""
    evidence = f"{before} → {after} on {base['rows']} rows, p = {test['p_corrected']:.2g}{more}: {test['verdict']}"
    if wanted == BETTER:
        return test["verdict"] == BETTER, evidence
    # A share can fall only in the rows where the base has it; any other figure in all of them.
    at_stake = behaviours.could_break(row) if percent and row["better"] == HIGHER else base["rows"]
    if not metrics.can_differ(at_stake, _tests(row, table, number)):
        return False, f"{before} → {after}: the base has {at_stake} rows to lose, too few to show a loss"
    return test["verdict"] != WORSE, evidence


def _tests(row: dict[str, Any], table: list[dict[str, Any]], number: int) -> int:
    """How many p values are corrected together with a row's."""
    if row["name"] == behaviours.ALL and "noise" in row:
        return 1
    family = [one for one in table if ("noise" in one) == ("noise" in row) and one["tests"][number]]
    return sum(not ("noise" in one and one["name"] == behaviours.ALL) for one in family)


def claim_lines(required: list[dict[str, Any]]) -> list[str]:
    """A line a claim, and how many hold."""
    several = len({one["side"] for one in required}) > 1
    lines = [
        f"{'✔' if one['met'] else '✘'} required{' of ' + one['side'] if several else ''}: {one['claim']}: "
        f"{one['evidence']}"
        for one in required
    ]
    return [*lines, f"{sum(one['met'] for one in required)} of {len(required)} requirements hold"]
