"""Better, or learned by heart? Forgotten what it knew? Verdicts on a tuned model, each with its evidence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from stepladder.errors import FAULT, GOOD, LOOK, Verdict
from stepladder.evaluation import loss, statistics
from stepladder.evaluation.loss import RowLoss
from stepladder.evaluation.metrics import words

SEED_WORDS = 4  # a run of fewer common words is chance, and is not looked for
COPIED = (8, 0.5)  # words, and share of the answer, that a run must have for the answer to be a copy
COPIES = 0.25  # share of copies above that of the references: a house's set phrases are in every good answer
KNOWN, HALF_KNOWN = 0.1, 0.7  # nats a token: each of a training answer is given a probability of 0.9, of 0.5
GAP, WIDE_GAP = 0.3, 1.0  # nats a token, beyond the base's: perplexity 1.35 and 2.7 times that on training rows
RISE, LOUD_RISE = 0.05, 0.3  # nats a token on general knowledge


class Trained:
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

    def copied(self, texts: list[str]) -> tuple[float, int]:
        """The share of texts that are copies of a training answer, and the longest run of all."""
        runs = [self.longest_run(text) for text in texts]
        least, share = COPIED
        copies = [run >= max(least, share * len(words(text))) for run, text in zip(runs, texts, strict=True)]
        return sum(copies) / max(len(texts), 1), max(runs, default=0)


def diverged(losses: list[RowLoss], whose: str) -> Verdict | None:
    """The verdict on a model with a loss that is no number, beside which no other says anything."""
    bad = sum(not math.isfinite(row.nats) for row in losses)
    evidence = f"of {whose}, on {bad} of {len(losses)} rows"
    help = "see where its weights became NaN: the run's curves; a third of learning_rate, max_grad_norm: 1.0"
    figures = {"rows": float(bad), "of": float(len(losses))}
    return Verdict(FAULT, "diverged", "Its loss is no number.", evidence, help, figures) if bad else None


def memorized(
    trained: Trained,
    answers: list[str],
    references: list[str],
    losses: tuple[tuple[float, float], tuple[float, float]] | None,
) -> Verdict:
    """Whether the answers to questions not trained on, or the losses, show training answers known by heart.

    Args:
        losses: on training rows, of the base and of the tuned model, and on held-out rows; where a side
            tells none, the copies alone are judged by.
    """
    share, run = trained.copied(answers)
    usual, _ = trained.copied([text for text in references if text])
    figures = {"copied": share, "copied_references": usual, "longest_run": float(run)}
    evidence = (
        f"{share:.0%} of the answers are copies of a training answer (of the references {usual:.0%}), longest common "
        f"run {run} words"
    )
    known, gap = False, 0.0
    if losses:
        on_training, held_out = losses
        gap = (held_out[1] - on_training[1]) - (held_out[0] - on_training[0])
        known = on_training[1] < (HALF_KNOWN if gap > WIDE_GAP else KNOWN)
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


def forgot(base: list[RowLoss], tuned: list[RowLoss]) -> Verdict:
    """Whether the loss on general knowledge, which was not trained on, has risen."""
    before, after = loss.mean(base), loss.mean(tuned, base)
    test = loss_test(base, tuned)
    rise, figures = after - before, {"before": before, "after": after, "p": test.p, "rows": float(len(base))}
    evidence = f"general knowledge: {before:.3f} before, {after:.3f} after ({rise:+.3f}, p = {test.p:.2g})"
    help = "mix_general: 0.1, a lower learning_rate, fewer epochs, or LoRA where it was full fine-tuning"
    if rise > RISE and test.p < statistics.LEVEL:
        times = f"; perplexity {math.exp(min(rise, 50)):.2f} times as high"
        severity, name = (FAULT, "forgot") if rise > LOUD_RISE else (LOOK, "forgot a little")
        return Verdict(severity, name, "It knows less than its base did.", evidence + times, help, figures)
    return Verdict(GOOD, "did not forget", "It knows what its base knew.", evidence, figures=figures)


def not_held_out(base: list[RowLoss], tuned: list[RowLoss]) -> Iterator[Verdict]:
    """What a comparison on training rows alone shows: rows known by heart, and nothing of others."""
    what, help = "Each row was trained on, so nothing shows what it does on others.", "--data with other rows"
    evidence, figures = "no row was held out", {}
    if base and tuned:
        before, after = loss.mean(base), loss.mean(tuned, base)
        figures = {"before": before, "after": after}
        evidence = f"loss on training rows {before:.3f} before, {after:.3f} after, on {len(base)} rows"
        if after < KNOWN:
            known = "fewer epochs, a lower learning_rate, more and more varied rows"
            yield Verdict(FAULT, "memorized", "It knows training answers by heart.", evidence, known, figures)
    yield Verdict(LOOK, "not held out", what, evidence, help, figures)


def better(base: list[RowLoss], tuned: list[RowLoss]) -> Verdict:
    """Whether the held-out loss fell by more than chance."""
    before, after, test = loss.mean(base), loss.mean(tuned, base), loss_test(base, tuned)
    figures = {"before": before, "after": after, "p": test.p}
    evidence = f"held-out loss {before:.3f} before, {after:.3f} after, on {len(base)} rows (p = {test.p:.2g})"
    if test.p >= statistics.LEVEL:
        what, help = "The held-out loss shows no difference to the base.", "more held-out rows; train longer"
        return Verdict(LOOK, "no difference shown", what, evidence, help, figures)
    if after > before:
        what, help = "It predicts held-out answers worse than its base.", "see the verdicts on the run's curves"
        return Verdict(FAULT, "worse than the base", what, evidence, help, figures)
    return Verdict(GOOD, "better than the base", "It predicts held-out answers better.", evidence, figures=figures)


def loss_test(base: list[RowLoss], tuned: list[RowLoss]) -> statistics.Difference:
    """The test of two models' losses on the same rows; each row weighs what its tokens are to the base."""
    weights = [float(row.tokens) for row in base]
    first, second = ([row.nats / of.tokens for row, of in zip(side, base, strict=True)] for side in (base, tuned))
    return statistics.paired(first, second, weights)
