"""Chapter 7 of the workshop: four techniques on the same data, and three tasks before and after."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, run
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


def before_and_after(played: Played, name: str, metric: str) -> None:
    facts = json.loads((played.folder / "runs" / name / "compare.json").read_text())
    (row,) = (row for row in facts["metrics"] if row["name"] == metric)
    assert len(facts["questions"]) == 3 and all(side["mean"] is not None for side in row["sides"]), row
    assert [side["loss"] > 0 for side in facts["sides"]] == [True, True]


def test_7_2_question_answering(played: Played) -> None:
    """Exact match and F1 of base and tuned, and the page shows them."""
    assert all(f"| {row}" in played.outputs[-1] for row in ("Criteria", "exact match", "F1")), played.outputs[-1]
    before_and_after(played, "qa", "exact match")
    before_and_after(played, "qa", "F1")


def test_7_3_summarization(played: Played) -> None:
    """ROUGE-L of base and tuned, and the page shows it."""
    assert all(f"| {row}" in played.outputs[-1] for row in ("Criteria", "ROUGE-L")), played.outputs[-1]
    before_and_after(played, "summaries", "ROUGE-L")


def test_7_4_code_generation(played: Played) -> None:
    """Likeness of base and tuned, and how many functions pass their tests."""
    before_and_after(played, "code", "chrF")
    assert played.outputs[-1].count("functions pass their tests") == 2


def test_7_4_the_count_of_passes_tells_right_from_wrong(tmp_path: Path) -> None:
    """Guards the judge itself: the reference answers pass all their tests, in fences too, and wrong ones none."""
    rows = [json.loads(line) for line in (ROOT / "data/workshop/code_eval.jsonl").read_text().splitlines()]
    right = [row["output"] for row in rows]
    sides = {
        "right": right,
        "fenced": [f"```python\n{code}\n```\nDone." for code in right],
        "wrong": [code.split("\n")[0] + "\n    return None" for code in right],
        "broken": ["def ("] * len(right),
    }
    facts = {"sides": [{"name": name, "answers": answers} for name, answers in sides.items()]}
    (tmp_path / "compare.json").write_text(json.dumps(facts))
    done = run(sys.executable, "docs/workshop/passes.py", tmp_path / "compare.json", "data/workshop/code_tests.jsonl")
    counts = dict(re.findall(r"^(\w+): (\d+) of 12", done.out, re.MULTILINE))
    assert counts == {"right": "12", "fenced": "12", "wrong": "0", "broken": "0"}, done


def test_8_1_questions_and_checklist(played: Played) -> None:
    """The checklist's commands run, and each of its boxes has its figure: fits, held-out loss, forgetting, verdicts."""
    data, shown, plan, _, report, compared = played.outputs
    assert "Dataset valid!" in data and "⟦" in shown and "✔" in plan
    assert re.search(r"^checklist: \w+", report, re.MULTILINE), report
    assert "held-out loss" in compared and re.search(r"(did not forget|forgot): general knowledge", compared), compared
    assert (played.folder / "runs/checklist/recipe.yaml").is_file()
