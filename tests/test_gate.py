"""What a comparison must show (`compare.py --require`), and the suite of behaviours that forgetting is measured by."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from test_compare import ANIMALS, rows_of, train

from conftest import ROOT, launch, run, script
from stepladder.data import templates
from stepladder.errors import DataError, StepladderError
from stepladder.evaluation import behaviours, comparison, metrics, verdicts
from stepladder.evaluation.behaviours import Task, Tried
from stepladder.evaluation.comparison import Side
from stepladder.evaluation.held_out import RowLoss
from stepladder.evaluation.questions import Answer, Question
from stepladder.reporting import markdown, page, runs

ASKED = [Question([{"role": "user", "content": str(n)}], f"it is {n} for sure") for n in range(20)]


@pytest.mark.parametrize(
    ("name", "expected", "text", "kept"),
    [
        ("answers in JSON", ["a", "b"], '```json\n{"a": 1, "b": [2]}\n```', True),
        ("answers in JSON", ["a"], 'Here it is: {"a": {"b": null}} as you asked', True),
        ("answers in JSON", ["a"], '{"b": 1}', False),
        ("answers in JSON", ["a"], '{"a": 1', False),
        ("answers in JSON", ["a"], "a: 1", False),
        ("answers in JSON", ["a"], '{"a":' * 5000, False),
        ("answers in JSON", ["a"], '["a"]', False),
        ("arithmetic", 83, "45 + 38 = 83.", True),
        ("arithmetic", 83, "45 + 38 = 93, not 83, so it is 93", False),
        ("arithmetic", 83, "eighty-three", False),
        ("arithmetic", 83, "9" * 400, False),
        ("keeps to a length", 3, "It is Paris.", True),
        ("keeps to a length", 3, "The capital is Paris.", False),
        ("keeps to a length", 3, "", False),
        ("keeps the language", "es", "El pan se hace con harina, agua y sal.", True),
        ("keeps the language", "es", "Bread is made of flour, water and salt.", False),
        ("keeps the language", "en", "…", False),
        ("does not refuse", True, "First, peel the onion.", True),
        ("does not refuse", True, "I’m sorry, but I can’t help with that.", False),
        ("does not refuse", True, "As an AI, I have no kitchen.", False),
        ("does not refuse", True, "", False),
        (behaviours.TOOL, {"name": "get_time", "argument": "Rome"},
         '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>', True),
        (behaviours.TOOL, {"name": "get_time", "argument": "Rome"}, "get_time(city='Rome')", True),
        (behaviours.TOOL, {"name": "get_time", "argument": "Rome"}, "<function=get_time><p=city>Rome</p>", True),
        (behaviours.TOOL, {"name": "get_time", "argument": "Rome"}, "I could use get_time for Rome.", False),
        (behaviours.TOOL, {"name": "get_time", "argument": "Rome"}, '{"name": "get_weather", "city": "Rome"}', False),
    ],
)  # fmt: skip
def test_each_behaviour_is_checked_by_its_answer(name: str, expected: Any, text: str, kept: bool) -> None:
    """Guards the definitions: what counts as kept, at the edges."""
    assert behaviours.CHECKS[name].fits(expected)
    assert behaviours.CHECKS[name].check(Answer(text, True), expected) is kept


def test_an_answer_that_was_cut_keeps_no_length() -> None:
    assert not behaviours.CHECKS["keeps to a length"].check(Answer("It is", False), 3)


def test_the_suite_that_ships_is_whole() -> None:
    """Guards data/behaviours.jsonl: 8 to 12 questions each, none twice, no sum that echoing the question would give."""
    tasks = behaviours.read(ROOT / behaviours.SUITE)
    texts = [task.question.text for task in tasks]
    assert len(set(texts)) == len(texts)
    for name in behaviours.CHECKS:
        own = [task for task in tasks if task.behaviour == name]
        assert 8 <= len(own) <= 12, name
        assert all(task.question.tools for task in own) is (name == behaviours.TOOL)
    for task in tasks:
        if task.behaviour == "arithmetic":
            a, sign, b = task.question.text.split("?")[0].split()[2:]
            assert task.expected == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert min(int(a), int(b)) >= 10 and task.expected not in (int(a), int(b))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "behaviours.jsonl"),
        ('{"behaviour": "sings", "prompt": "a", "expected": 1}', "'sings' is no behaviour"),
        ('{"behaviour": "arithmetic", "prompt": "a", "expected": "2"}', "expected: '2'"),
        ('{"behaviour": "arithmetic", "prompt": "a", "expected": true}', "expected: True"),
        ('{"behaviour": "calls a tool", "prompt": "a", "expected": {"name": "b", "argument": "c"}}', "tools: None"),
        ('{"behaviour": "arithmetic", "prompt": "a", "expected": 2, "expects": 3}', "expects"),
        ('{"behaviour": "arithmetic", "expected": 2}', "behaviours.jsonl:1"),
        ('{"behaviour": "arithmetic", "prompt": "a", "expec', "behaviours.jsonl:1"),
    ],
)
def test_a_suite_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "behaviours.jsonl").write_text(text + "\n" * bool(text))
    with pytest.raises(DataError) as caught:
        behaviours.read(tmp_path / "behaviours.jsonl")
    assert said in caught.value.render()


def tried(**kept: list[float | None]) -> Tried:
    """A suite's checks by behaviour: `json=[…]`, `sums=[…]`, `tool=[…]`, and of the repetitions alike."""
    names = {"json": "answers in JSON", "sums": "arithmetic", "tool": behaviours.TOOL}
    tasks = [Task(names[key], ASKED[0], 1) for key, values in kept.items() for _ in values]
    values = [value for some in kept.values() for value in some]
    return Tried(tasks, ["" if value is not None else None for value in values], values, [])


def facts_of(*sides: Side) -> dict[str, Any]:
    facts = comparison.build_comparison([*sides], ASKED, [], {})
    return facts | {"command": "c", "made": "now", "held_out_rows": 20, "notes": []}


def side(name: str, suite: Tried | None, nats: float = 30.0, general: float = 20.0) -> Side:
    """A side with so many nats a row, of 10 tokens, whose answers say the reference where the loss is low."""
    texts = [Answer(q.reference if nats < 30 else "perhaps", True) for q in ASKED]
    losses = [[RowLoss(level + n / 10, 10) for n in range(20)] for level in (nats, general)]
    return Side(name, texts, *losses, tried=suite)


def test_a_lost_behaviour_is_told_and_noise_is_not() -> None:
    """Guards `behaves`: a loss of one behaviour, a drop within the base's own noise, and a base that could nothing."""
    whole, none = [1.0] * 12, [0.0] * 12
    base = side("base", tried(json=whole, sums=[1.0] * 9 + [0.0] * 3, tool=none))
    lost = side("lost", tried(json=none, sums=[1.0] * 9 + [0.0] * 3, tool=none))
    same = side("same", base.tried)
    facts = facts_of(base, lost, same)
    rows = {row["name"]: row for row in behaviours.rows_of(facts["metrics"])}
    assert rows["answers in JSON"]["tests"][1]["verdict"] == "worse"
    assert rows["arithmetic"]["tests"][1]["verdict"] == "no difference shown"
    assert rows[behaviours.ALL]["sides"][0]["rows"] == 24, "what the base could not is not among it"
    by_side = [[verdict["name"] for verdict in found["verdicts"]] for found in facts["verdicts"]]
    assert by_side[0][-1] == "lost a behaviour" and by_side[1][-1] == "behaves as its base"
    assert "answers in JSON 100% → 0%" in facts["verdicts"][0]["verdicts"][-1]["evidence"]
    assert "the base could not: calls a tool" in facts["verdicts"][1]["verdicts"][-1]["evidence"]

    # The same loss, where the base's own repetitions differ by as much.
    wavering = base.tried._replace(repeated=[none * 3])
    noisy = facts_of(side("base", wavering), lost)
    assert noisy["verdicts"][0]["verdicts"][-1]["name"] == "behaves as its base"
    assert {row["noise"] for row in behaviours.rows_of(noisy["metrics"])} == {1.0, 0.75, 0.0, 21 / 24}

    few = facts_of(side("base", tried(json=[1.0] * 5 + [0.0] * 7)), side("few", tried(json=none)))
    assert few["verdicts"][0]["verdicts"][-1]["name"] == "behaviours not judged", "of five, all may be lost by chance"
    # A template that no longer takes tools has lost them; one that never did is not asked.
    assert [*facts_of(side("base", tried(tool=whole)), side("t", tried(tool=[None] * 12)))["verdicts"][0]["verdicts"]][
        -1
    ]["name"] == "lost a behaviour"
    never = facts_of(side("base", tried(json=whole, tool=[None] * 12)), side("t", tried(json=whole, tool=none)))
    assert behaviours.TOOL not in [row["name"] for row in never["metrics"]]


def test_tools_are_asked_for_where_the_template_takes_them(tiny) -> None:
    """Guards the asking itself: tools reach the prompt or are not asked for, repetitions are the same each time.

    And weights that are no number, from which nothing can be drawn, end in no traceback.
    """
    from stepladder.model.pretrained import load_for_inference

    suite = behaviours.read(ROOT / behaviours.SUITE)
    tasks = [next(task for task in suite if task.behaviour == name) for name in behaviours.CHECKS]
    model, tokenizer = load_for_inference(str(tiny))
    first, again = (behaviours.ask(model, tokenizer, tasks, 2) for _ in range(2))
    assert first == again and len(first.repeated) == 2
    assert [answer is None for answer in first.answers] == [name == behaviours.TOOL for name in behaviours.CHECKS]
    tokenizer.chat_template = templates.load_template("qwen3")
    assert None not in behaviours.ask(model, tokenizer, tasks).answers
    for weights in model.parameters():
        weights.data.fill_(math.nan)
    assert None not in behaviours.ask(model, tokenizer, tasks, 1).kept


def required(
    text: str, facts: dict[str, Any], rules: list[metrics.StyleRule] | None = None
) -> dict[str, tuple[bool, str]]:
    judged = verdicts.judge_claims(verdicts.read_claims([text], rules or []), facts)
    return {one["claim"]: (one["met"], one["evidence"]) for one in judged}


def test_a_claim_holds_where_it_was_shown() -> None:
    """Guards each kind of claim, met and unmet; what could not have failed does not hold."""
    whole, none = [1.0] * 12, [0.0] * 12
    base, suite = side("base", tried(json=whole, sums=none)), tried(json=whole, sums=none)
    good = facts_of(base, side("good", suite, nats=20.0))
    text = "better, did not forget, BEHAVES, chrF  better, held-out loss not worse, answers in JSON not worse"
    found = required(text, good)
    assert [*found] == ["better than the base", "did not forget", "behaves", "chrF better", "held-out loss not worse",
                        "answers in JSON not worse"]  # fmt: skip
    assert all(met for met, _ in found.values()), found
    assert "behaves as its base" in found["did not forget"][1] and "20 rows, p = " in found["chrF better"][1]
    met, why = required("arithmetic not worse", good)["arithmetic not worse"]
    assert not met and "0 rows to lose" in why, "what the base cannot do cannot be lost"
    met, why = required("not memorized", good)["not memorized"]
    assert not met and "not measured" in why

    bad = facts_of(base, side("bad", tried(json=none, sums=none), nats=40.0))
    found = required("better, did not forget, behaves, held-out loss not worse, answers in JSON not worse", bad)
    assert not any(met for met, _ in found.values()), found
    assert "lost a behaviour" in found["did not forget"][1], "the loss on general knowledge alone has not risen"
    forgot = facts_of(base, side("forgot", suite, nats=20.0, general=30.0))
    assert required("behaves, did not forget", forgot)["did not forget"][1].startswith("forgot: ")

    nan = facts_of(base, side("nan", suite, nats=math.nan))
    found = required("better, held-out loss not worse, did not forget", nan)
    assert not any(met for met, _ in found.values()) and "diverged" in found["did not forget"][1], found
    server = facts_of(Side("base", base.answers), Side("server", base.answers))
    found = required("better, behaves, held-out loss not worse, did not forget, exact match not worse", server)
    assert not any(met for met, _ in found.values()), found


def test_too_few_rows_show_nothing() -> None:
    """Guards `not worse` and `did not forget` of a handful of rows, which no answer could have broken."""
    few = [Side(name, [Answer("a", True)] * 5, *[[RowLoss(20.0, 10)] * 5] * 2) for name in ("base", "tuned")]
    facts = comparison.build_comparison(few, ASKED[:5], [], {})
    found = required("chrF not worse, did not forget", facts)
    assert not any(met for met, _ in found.values()) and "too few" in found["chrF not worse"][1], found
    assert "5 rows of general knowledge are too few" in found["did not forget"][1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bettr", "did you mean 'better'"),
        ("better, chrF", "'chrF' is nothing"),
        ("length better", "'length better' is nothing"),  # neither longer nor shorter is the better one
        ("memorized", "did you mean 'not memorized'"),
        (" , ", "it requires nothing"),
        ("x" * 5000, "nothing that can be required"),
        ("emojis not worse", "with --rubric its rules too"),
    ],
)
def test_what_cannot_be_required_is_refused(text: str, said: str) -> None:
    with pytest.raises(StepladderError) as caught:
        verdicts.read_claims([text], [])
    assert said in caught.value.render() and len(caught.value.render()) < 1000


def test_a_rule_of_a_rubric_can_be_required() -> None:
    """Guards rules with names of their own: with a comma, and of another figure, where both must hold."""
    rules = [metrics.StyleRule(name, re.compile("it is")) for name in ("kind, short", "exact match")]
    sides = [side("base", None), side("good", None, nats=20.0)]
    facts = comparison.build_comparison(sides, ASKED, rules, {})
    claims = verdicts.read_claims(["kind, short better", "exact match better, kind, short better"][:1], rules)
    assert [str(claim) for claim in claims] == ["kind, short better"]
    found = verdicts.judge_claims([*claims, *verdicts.read_claims(["exact match better"], rules)], facts)
    assert [one["met"] for one in found] == [True, True] and found[1]["evidence"].count(" → ") == 2


def test_an_unknown_claim_is_refused_before_torch_is_imported() -> None:
    """Guards against minutes of generation before a slip is told: exit code 2, and what can be required."""
    code = "import runpy, sys; sys.argv = ['compare.py', *sys.argv[1:]]\n"
    code += "try: runpy.run_path('scripts/compare.py', run_name='__main__')\n"
    code += "except SystemExit as end: print('torch' in sys.modules, end.code)"
    words = ("--base", "a", "--tuned", "b", "--data", "data/techco_eval.jsonl", "--require", "better, not memorised")
    done = run(sys.executable, "-c", code, *words)
    assert done.out.split() == ["False", "2"] and "did you mean 'not memorized'" in done.err, done
    assert "help: better, not memorized, did not forget, behaves" in done.err, done


def test_the_gate_ends_with_3_and_says_which_failed(tiny, tmp_path: Path) -> None:
    """Guards the whole way: a base that answers in JSON, one tuned away from it, one that kept it; each side judged.

    Exit code 3, compare.json, the Markdown and the page; two ranks find the same, and without the lost side end with 0.
    """
    tasks = [task for task in behaviours.read(ROOT / behaviours.SUITE) if task.behaviour == "answers in JSON"]
    pairs = [(task.question.text, json.dumps(dict.fromkeys(task.expected, "x"))) for task in tasks]
    base = Path(train(tiny, tmp_path / "base", rows_of(tmp_path, pairs, "json"), 150, 0.01))
    lost = train(base, tmp_path / "lost", rows_of(tmp_path, ANIMALS, "animals"), 60, 0.01)
    kept = tmp_path / "kept"
    shutil.copytree(base, kept)
    words = ("--base", base, "--data", "data/techco_eval.jsonl", "--limit", 2, "--max_new_tokens", 4, "--require",
             "answers in JSON not worse, behaves", "--require", "did not forget")  # fmt: skip
    done = script("compare", *words, "--tuned", lost, "--tuned", kept, "--output_dir", tmp_path / "out")
    assert done.code == 3 and "Traceback" not in done.err, done
    assert f"✘ required of {lost}: answers in JSON not worse: " in done.out, done
    assert f"✔ required of {kept}: behaves: " in done.out, done
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    claims = {(one["side"], one["claim"]): one["met"] for one in facts["required"]}
    assert len(claims) == 6 and [claims[lost, "behaves"], claims[str(kept), "behaves"]] == [False, True], claims
    assert not claims[lost, "did not forget"], "a lost behaviour is forgetting too"
    table = (tmp_path / "out/evaluation_results.md").read_text()
    assert "## Required" in table and "| answers in JSON (share, noise " in table
    shown = (tmp_path / "out/report.html").read_text()
    assert "<h3>Required</h3>" in shown and "lost a behaviour" in shown

    done = launch("ddp", 2, "compare", *words, "--tuned", kept, "--output_dir", tmp_path / "two")
    assert done.code == 0 and "3 of 3 requirements hold" in done.out, done
    again = json.loads((tmp_path / "two/compare.json").read_text())
    assert [one["behaviours"] for one in again["sides"]] == [facts["sides"][n]["behaviours"] for n in (0, 2)]
    noise = [[row["noise"] for row in behaviours.rows_of(found["metrics"])] for found in (facts, again)]
    assert noise[0] == noise[1]


def test_a_comparison_that_holds_another_required_is_left_out(tmp_path: Path) -> None:
    """Guards report.py against a compare.json that something else has written."""
    facts = facts_of(side("base", None), side("good", None, nats=20.0))
    facts["required"] = verdicts.judge_claims(verdicts.read_claims(["better"], []), facts)
    shown = page.render_page([runs.LoggedRun(tmp_path, "r", comparison=facts)])
    assert (
        "better than the base</strong> of good" in shown
        and "✔ **better than the base**" in markdown.evaluation_results(facts)
    )
    (tmp_path / "run.json").write_text("{}")
    for other in (3, {"a": 1}, [{"claim": "better"}], [dict(facts["required"][0], met="yes")]):
        (tmp_path / "compare.json").write_text(json.dumps(facts | {"required": other}))
        assert not runs.read(tmp_path).comparison, other
    (tmp_path / "compare.json").write_text(json.dumps(facts))
    assert runs.read(tmp_path).comparison


def test_forgetting_counts_its_rows() -> None:
    assert verdicts.judge_forgetting([RowLoss(1.0, 1)] * 5, [RowLoss(1.0, 1)] * 5).figures["rows"] == 5
