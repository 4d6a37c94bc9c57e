"""Figures of answers: likeness to a reference, repetition, length, style rules; and what differs beyond chance.

A figure is the weighted mean of a value per answer, Σ wᵢvᵢ / Σ wᵢ, so that the rows of two models can be compared
in pairs. Only distinct-n is of all answers together: that all are the same shows in no single one. Intervals and
tests are over the rows (another draw of questions would have given other figures), seeded, and assume no shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import files, installation
from stepladder.data.templates.chat_template import LimitExceeded, limit_resources
from stepladder.errors import LEVEL, DataError
from stepladder.evaluation.questions import Answer
from stepladder.suggest import suggest

HIGHER, LOWER, NEITHER = "higher", "lower", "neither"  # which of two figures is the better one
REPEATED = 4  # words of a run that counts as repeated
SEED, RESAMPLES, BLOCK = 42, 5000, 250
Floats = Sequence[float]


class Metric(NamedTuple):
    """`required` and `facts` are a rule's."""

    name: str
    better: str
    unit: str = ""
    required: float | None = None
    facts: bool = False


CHRF = Metric("chrF", HIGHER, "0–100")
ROUGE_L = Metric("ROUGE-L", HIGHER, "0–1")
EXACT = Metric("exact match", HIGHER, "share")
F1 = Metric("F1", HIGHER, "0–1")
REPETITION = Metric("repetition", LOWER, "share")
STOPPED = Metric("stops by itself", HIGHER, "share")
LENGTH = Metric("length", NEITHER, "words")
LOSS = Metric("held-out loss", LOWER, "nats per token")
TRAINING_LOSS = Metric("loss on training rows", LOWER, "nats per token")  # where no row was held out
METRICS = (CHRF, ROUGE_L, EXACT, F1, REPETITION, STOPPED, LENGTH)


def score_answer(answer: Answer, reference: str) -> dict[Metric, float | None]:
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


@dataclass(frozen=True)
class StyleRule:
    """A style rule: a regular expression that an answer holds from `at_least` to `at_most` times.

    With `in_reference`, only what the reference holds too counts; where the reference holds none of
    it, the rule does not apply. `required` is the least share of answers (0 to 1) that must keep the rule;
    `facts` says that it judges whether answers are true, which needs such a share.
    """

    name: str
    pattern: re.Pattern[str]
    at_least: int = 1
    at_most: int | None = None
    in_reference: bool = False
    required: float | None = None
    facts: bool = False

    def kept(self, answer: str, reference: str) -> float | None:
        """1 or 0; None where the rule does not apply."""
        found = self._matches(answer)
        if self.in_reference:
            wanted = {*self._matches(reference)}
            if not wanted:
                return None
            found = [text for text in set(found) if text in wanted]
        return float(self.at_least <= len(found) and (self.at_most is None or len(found) <= self.at_most))

    def _matches(self, text: str) -> list[str]:
        try:
            with limit_resources():
                return [match.group() for match in self.pattern.finditer(text)]
        except LimitExceeded:
            raise DataError(
                f"the pattern of the rule '{self.name}' takes seconds to match against one answer",
                why="a repetition within another one, as in (a+)+, is tried in every way that it can divide a text",
                help="a plainer regular expression",
            ) from None


def read_rubric(path: Path) -> list[StyleRule]:
    """The rules of a YAML file of style rules, in their order (data/techco_rubric.yaml is one).

    Raises:
        DataError: no such file, no YAML, an unknown key, a pattern that is none.
    """
    try:
        found = files.parse_yaml(files.read_text(installation.locate(path), files.YAML_BYTES))
    except ValueError as error:
        why = f"{error}; {installation.places(path)}".removesuffix("; ")
        raise DataError(f"the rubric {path} cannot be read", why=why, help="see data/techco_rubric.yaml") from None
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no rules", help="NAME: {pattern: '…'}, as in data/techco_rubric.yaml")
    return [_rule(str(name), keys, str(path)) for name, keys in found.items()]


def _rule(name: str, keys: Any, where: str) -> StyleRule:
    known = {field.name: field.type for field in dataclasses.fields(StyleRule)}
    if not isinstance(keys, dict) or not isinstance(keys.get("pattern"), str):
        raise DataError(f"the rule '{name}' has no pattern", where=where, help="pattern: 'a regular expression'")
    for key, value in keys.items():
        if key not in known or key == "name":
            raise DataError(f"unknown key '{key}' in the rule '{name}'", where=where, help=suggest(key, known))
        if key in ("at_least", "at_most") and (type(value) is not int or value < 0):
            raise DataError(f"{key} of the rule '{name}' is {value!r}", where=where, help="a number of matches")
        if key in ("in_reference", "facts") and type(value) is not bool:
            raise DataError(f"{key} of the rule '{name}' is {value!r}", where=where, help="true or false")
        if key == "required" and (type(value) not in (int, float) or not 0 < value <= 1):
            help = "a share of the answers above 0 and up to 1, such as 0.95"
            raise DataError(f"required of the rule '{name}' is {value!r}", where=where, help=help)
    if keys.get("facts") and not keys.get("required"):
        why = "a model that gets few facts right would be recommended all the same"
        raise DataError(f"the rule '{name}' judges facts and requires none", where=where, why=why,
                        help="required: 0.95")  # fmt: skip
    try:
        return StyleRule(name, **{**keys, "pattern": re.compile(keys["pattern"])})
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"the pattern of the rule '{name}' is none: {error}", where=where) from None


@dataclass(frozen=True)
class Difference:
    """Second minus first, its 95 % interval, and the chance `p` of one so large where there is no difference."""

    mean: float
    low: float
    high: float
    p: float


def interval(values: Floats, weights: Floats) -> tuple[float, float, float]:
    """The weighted mean and its 95 % percentile bootstrap interval (Efron, 1979).

    All are NaN if a value is not a number.
    """
    import numpy as np

    v, w = np.asarray(values, float), np.asarray(weights, float)
    if not np.isfinite(v).all():
        return math.nan, math.nan, math.nan
    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(RESAMPLES // BLOCK):  # in blocks: thousands of rows times thousands of resamples are gigabytes
        rows = generator.integers(len(v), size=(BLOCK, len(v)))
        drawn.append((v * w)[rows].sum(1) / w[rows].sum(1))
    low, high = np.quantile(np.concatenate(drawn), [LEVEL / 2, 1 - LEVEL / 2])
    return float(np.average(v, weights=w)), float(low), float(high)


def jackknife(whole: float, without: Floats) -> tuple[float, float]:
    """The 95 % interval of a figure of all items together, by those that leave out one item each (Tukey, 1958).

    For how different items are: a bootstrap draws items twice, and twins are never different.
    """
    import numpy as np

    spread = 1.96 * float(np.sqrt((len(without) - 1) * np.asarray(without, float).var()))
    return whole - spread, whole + spread


def compare_paired(first: Floats, second: Floats, weights: Floats) -> Difference:
    """Two systems on the same rows: paired bootstrap for the interval (Koehn, 2004), paired permutation for p.

    The permutation exchanges the two values of random rows (approximate randomization: Noreen, 1989;
    Riezler & Maxwell, 2005). p counts the observed order too, so that it is never 0 (Phipson & Smyth, 2010).
    """
    import numpy as np

    w = np.asarray(weights, float)
    d = np.asarray(second, float) - np.asarray(first, float)
    mean, low, high = interval(d.tolist(), weights)
    if not math.isfinite(mean):  # NaN is not “at least as extreme” as anything: p would be the smallest there is
        return Difference(mean, low, high, 1.0)
    generator = np.random.default_rng(SEED)
    extreme, observed = 0, abs((d * w).sum()) * (1 - 1e-9)  # up to the rounding of the sums
    for _ in range(RESAMPLES // BLOCK):
        signs = generator.choice([-1.0, 1.0], size=(BLOCK, len(d)))
        extreme += int((abs((signs * d * w).sum(1)) >= observed).sum())
    return Difference(mean, low, high, (extreme + 1) / (RESAMPLES + 1))


def can_differ(rows: int, tests: int = 1) -> bool:
    """Whether so many rows can show a difference at all, corrected for so many tests (Holm's first factor).

    Of the 2ⁿ exchanges of n pairs, the observed one and its mirror image are always as extreme.
    """
    return 2.0 ** (1 - min(rows, 1000)) * tests < LEVEL


def holm(ps: Floats) -> list[float]:
    """p values corrected for there being several (Holm, 1979): among twenty tests one would pass by chance."""
    order, corrected, least = sorted(range(len(ps)), key=ps.__getitem__), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected
