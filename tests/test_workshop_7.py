"""Chapter 7 of the workshop: four techniques on the same data, and three tasks before and after."""

from __future__ import annotations

import json

import pytest

from played import Played

pytestmark = pytest.mark.proof


def test_7_1_four_techniques(played: Played) -> None:
    """One table of what each of the four trained, took and reached."""
    counts = {name: played.run(name)["parameters"]["trainable"] for name in ("full", "lora", "prefix", "prompt")}
    assert counts["full"] > counts["lora"] > counts["prefix"] > counts["prompt"] == 20 * 576
    assert counts["prefix"] == 20 * 30 * 2 * 3 * 64
    table = played.outputs[4].splitlines()
    assert table[0].split() == ["run", "trained", "steps", "seconds", "tokens/s", "GiB", "loss", "held-out", "loss"]
    assert [line.split()[0] for line in table[1:5]] == ["full", "lora", "prefix", "prompt"]


def before_and_after(played: Played, run: str, metric: str) -> None:
    facts = json.loads((played.folder / "runs" / run / "compare.json").read_text())
    (row,) = (row for row in facts["metrics"] if row["name"] == metric)
    assert len(facts["questions"]) == 3 and all(side["mean"] is not None for side in row["sides"]), row
    assert [side["loss"] > 0 for side in facts["sides"]] == [True, True]


def test_7_2_question_answering(played: Played) -> None:
    """Exact match and F1 of base and tuned."""
    before_and_after(played, "qa", "exact match")
    before_and_after(played, "qa", "F1")


def test_7_3_summarization(played: Played) -> None:
    """ROUGE-L of base and tuned."""
    before_and_after(played, "summaries", "ROUGE-L")


def test_7_4_code_generation(played: Played) -> None:
    """Likeness of base and tuned, and how many functions pass their tests."""
    before_and_after(played, "code", "chrF")
    assert played.outputs[-1].count("functions pass their tests") == 2
