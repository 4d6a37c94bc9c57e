"""A judgement that a person reads: on a run's curves, or on what a model's answers show."""

from __future__ import annotations

from dataclasses import dataclass, field

GOOD, LOOK, FAULT = "good", "look", "fault"
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"  # what a paired test says
LEVEL = 0.05  # the chance of calling a difference real that is none


@dataclass(frozen=True)
class Verdict:
    """`severity` is good, look or fault; `evidence` says the `figures` (losses in nats a token) in words."""

    severity: str
    name: str
    what: str
    evidence: str
    help: str = ""
    figures: dict[str, float] = field(default_factory=dict)
