"""What a comparison must show for a model to pass: `compare.py --require "better, not memorized"`, for CI.

A claim is a verdict, a figure that is better or not worse, or that no behaviour was lost. One that was not
measured does not hold, nor does one that no answer could have broken (too few rows, a figure that is 0 already).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stepladder.errors import StepladderError, suggest
from stepladder.evaluation import behaviours, metrics, statistics
from stepladder.evaluation.metrics import BETTER, HIGHER, NEITHER, WORSE
from stepladder.evaluation.rubric import Rule

NOT_WORSE, BEHAVES, FORGET = "not worse", "behaves", "did not forget"
LOSS = "held-out loss"
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


class Claim(NamedTuple):
    """`subject` is a verdict's or figure's name, or `behaves`; `wanted` is BETTER or NOT_WORSE of a figure."""

    subject: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"{self.subject} {self.wanted}".strip()


def read(texts: Sequence[str], rules: Sequence[Rule]) -> list[Claim]:
    """The claims of a comma-separated list, each once.

    Args:
        texts: what each --require says.
        rules: the rubric's, whose names are figures.

    Raises:
        StepladderError: there is none, or nothing of that name can be required.
    """
    known = _known(rules)
    claims = []
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


def _figures(rules: Sequence[Rule]) -> list[str]:
    own = [metric.name for metric in metrics.METRICS if metric.better != NEITHER]
    return [LOSS, *own, *(rule.name for rule in rules), *behaviours.CHECKS, behaviours.ALL]


def _known(rules: Sequence[Rule]) -> dict[str, Claim]:
    claims = [Claim(name, wanted) for name in _figures(rules) for wanted in (BETTER, NOT_WORSE)]
    claims += [Claim(BEHAVES), *map(Claim, VERDICTS)]
    return {_plain(str(claim)): claim for claim in claims} | {short: Claim(name) for short, name in SHORT.items()}


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _listed(rules: Sequence[Rule]) -> str:
    verdicts = ", ".join([*SHORT, *(name for name in VERDICTS if name not in SHORT.values()), BEHAVES])
    more = "" if rules else "; with --rubric its rules too"
    return f"{verdicts}; and of each of these '… better' or '… not worse': {', '.join(_figures(rules))}{more}"


def asks_behaviours(claims: Sequence[Claim]) -> bool:
    """Whether the suite of behaviours must be asked: forgetting is more than a loss on general knowledge."""
    return any(claim.subject in (BEHAVES, FORGET, behaviours.ALL, *behaviours.CHECKS) for claim in claims)


def judge(claims: Sequence[Claim], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim of each tuned side: whether it holds (`met`), and the evidence.

    Args:
        facts: a comparison, as compare.json holds it.
    """
    found = []
    for number, judged in enumerate(facts["verdicts"], start=1):
        verdicts = {verdict["name"]: verdict for verdict in judged["verdicts"]}
        for claim in claims:
            if claim.wanted:
                met, evidence = _figure(claim, facts["metrics"], number)
            elif claim.subject == BEHAVES:
                met, evidence = _behaves(facts["metrics"], number)
            else:
                met, evidence = _verdict(claim.subject, verdicts)
            if claim.subject == FORGET and met:
                met, evidence = _nor_behaviours(evidence, facts["metrics"], number)
            found.append({"side": judged["side"], "claim": str(claim), "met": met, "evidence": evidence})
    return found


def _verdict(name: str, verdicts: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    others, needs = VERDICTS[name]
    given = next((verdicts[one] for one in (name, *others, *INSTEAD) if one in verdicts), None)
    if given is None:
        return False, f"not measured: {needs}"
    if given["name"] != name:
        return False, f"{given['name']}: {given['evidence']}"
    rows = given["figures"].get("rows")
    if name == FORGET and rows is not None and not statistics.can_differ(int(rows)):
        return False, f"{int(rows)} rows of general knowledge are too few to show forgetting"
    return True, given["evidence"]


def _figure(claim: Claim, table: list[dict[str, Any]], number: int) -> tuple[bool, str]:
    """A rule of a rubric may have the name of another figure: then both must hold."""
    rows = [row for row in table if row["name"].casefold() == claim.subject.casefold()]
    found = [_row(claim.wanted, row, table, number) for row in rows]
    if not found:
        return False, "not measured"
    return all(met for met, _ in found), "; ".join(evidence for _, evidence in found)


def _row(wanted: str, row: dict[str, Any], table: list[dict[str, Any]], number: int) -> tuple[bool, str]:
    base, side, test = row["sides"][0], row["sides"][number], row["tests"][number]
    if not (base and side and test):
        return False, "not measured on both sides"
    if base["mean"] is None or side["mean"] is None:
        return False, "a side's figure is no number"
    percent = row["unit"].startswith("share")
    before, after = (f"{one['mean']:.0%}" if percent else f"{one['mean']:.3f}" for one in (base, side))
    more = f", noise {row['noise']:.0%}" if "noise" in row else ""
    evidence = f"{before} → {after} on {base['rows']} rows, p = {test['p_corrected']:.2g}{more}: {test['verdict']}"
    if wanted == BETTER:
        return test["verdict"] == BETTER, evidence
    # A share can fall only in the rows where the base has it; any other figure in all of them.
    at_stake = behaviours.could_break(row) if percent and row["better"] == HIGHER else base["rows"]
    if not statistics.can_differ(at_stake, _tests(row, table, number)):
        return False, f"{before} → {after}: the base has {at_stake} rows to lose, too few to show a loss"
    return test["verdict"] != WORSE, evidence


def _tests(row: dict[str, Any], table: list[dict[str, Any]], number: int) -> int:
    """How many p values are corrected together with a row's."""
    if row["name"] == behaviours.ALL and "noise" in row:
        return 1
    family = [one for one in table if ("noise" in one) == ("noise" in row) and one["tests"][number]]
    return sum(not ("noise" in one and one["name"] == behaviours.ALL) for one in family)


def _behaves(table: list[dict[str, Any]], number: int) -> tuple[bool, str]:
    verdict = behaviours.verdict(table, number)
    if verdict is None:
        return False, "not measured: both sides must be models"
    words = "" if verdict.severity == "good" else f"{verdict.name}: {verdict.what} "
    return verdict.severity == "good", words + verdict.evidence


def _nor_behaviours(evidence: str, table: list[dict[str, Any]], number: int) -> tuple[bool, str]:
    """Beside the loss: no behaviour was lost; a base that could none has none to lose."""
    verdict = behaviours.verdict(table, number)
    if verdict is None:
        return True, evidence
    return verdict.severity != "fault", f"{evidence}; {verdict.name}: {verdict.evidence}"


def lines(required: list[dict[str, Any]]) -> list[str]:
    """A line a claim, and how many hold."""
    several = len({one["side"] for one in required}) > 1
    told = [
        f"{'✔' if one['met'] else '✘'} required{' of ' + one['side'] if several else ''}: {one['claim']}: "
        f"{one['evidence']}"
        for one in required
    ]
    return [*told, f"{sum(one['met'] for one in required)} of {len(required)} requirements hold"]
