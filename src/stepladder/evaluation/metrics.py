"""Figures of answers, an answer at a time: likeness to a reference, repetition, length, stopping, style.

Each is a mean over the answers, so that the rows of two models can be compared in pairs. Only
distinct-n is of all answers together: that all are the same shows in no single one.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from typing import NamedTuple

from stepladder.evaluation.questions import Answer

HIGHER, LOWER, NEITHER = "higher", "lower", "neither"  # which of two figures is the better one
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"  # what a paired test says
REPEATED = 4  # words of a run that counts as repeated


class Metric(NamedTuple):
    """`needs_reference`: it says nothing of an answer without one. `required` and `facts` are a rule's."""

    name: str
    better: str
    unit: str = ""
    needs_reference: bool = False
    required: float | None = None
    facts: bool = False


CHRF = Metric("chrF", HIGHER, "0–100", True)
ROUGE_L = Metric("ROUGE-L", HIGHER, "0–1", True)
EXACT = Metric("exact match", HIGHER, "share", True)
F1 = Metric("F1", HIGHER, "0–1", True)
REPETITION = Metric("repetition", LOWER, "share")
STOPPED = Metric("stops by itself", HIGHER, "share")
LENGTH = Metric("length", NEITHER, "words")
METRICS = (CHRF, ROUGE_L, EXACT, F1, REPETITION, STOPPED, LENGTH)


def of_answer(answer: Answer, reference: str) -> dict[Metric, float | None]:
    """The figures of one answer; None where the metric needs a reference and there is none (it is empty)."""
    text = answer.text
    found: dict[Metric, float | None] = dict.fromkeys(METRICS)
    if reference:
        normal, wanted = _normal(text), _normal(reference)
        found |= {
            CHRF: _chrf().sentence_score(text, [reference]).score,
            ROUGE_L: _rouge().score(reference, text)["rougeL"].fmeasure,
            EXACT: float(normal == wanted),
            F1: _f1(normal.split(), wanted.split()),
        }
    runs = _ngrams(words(text), REPEATED)
    return found | {
        REPETITION: 1 - len(set(runs)) / len(runs) if runs else 0.0,
        STOPPED: float(answer.stopped),
        LENGTH: float(len(words(text))),
    }


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams as a share of all, over all answers (Li et al., 2016, distinct-n); 0 without any."""
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_without(texts: list[str], n: int) -> list[float]:
    """`distinct` of all texts but one, for each."""
    each = [Counter(_ngrams(words(text), n)) for text in texts]
    every: Counter[tuple[str, ...]] = Counter()
    for own in each:
        every.update(own)
    kinds, total = len(every), every.total()
    lost = [sum(every[gram] == count for gram, count in own.items()) for own in each]
    return [(kinds - gone) / max(total - own.total(), 1) for gone, own in zip(lost, each, strict=True)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


@functools.cache
def _chrf():
    """chrF2, sacrebleu's default (Popović, 2015): character n-grams up to 6, recall twice as heavy as precision."""
    from sacrebleu.metrics import CHRF as Scorer

    return Scorer()


@functools.cache
def _rouge():
    """ROUGE-L (Lin, 2004); its own tokenizer knows no letters but a to z, and would score other scripts 0."""
    from rouge_score import rouge_scorer, tokenizers

    class Words(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def _normal(text: str) -> str:
    """SQuAD's normalization (Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))
