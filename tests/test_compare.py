"""Base against tuned: the figures, the tests behind `better`, the verdicts, servers and transcripts as sides."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from conftest import ROOT, launch, script
from stepladder.data import mixture
from stepladder.errors import DataError, ModelError
from stepladder.evaluation import (
    comparison,
    metrics,
    questions,
    sides,
    verdicts,
)
from stepladder.evaluation.comparison import Side
from stepladder.evaluation.held_out import RowLoss, mean_loss, measure_losses
from stepladder.evaluation.questions import Answer, Question
from stepladder.reporting import markdown, page, runs

TECHCO = metrics.read_rubric(ROOT / "data/techco_rubric.yaml")


def figures(text: str, reference: str = "") -> dict[str, float | None]:
    return {metric.name: value for metric, value in metrics.score_answer(Answer(text, True), reference).items()}


def test_likeness_to_a_reference_by_hand() -> None:
    """Guards the definitions: the figures of one pair, worked out on paper."""
    found = figures("The cat sat on the mat.", "A cat ran on the mat")
    assert found["ROUGE-L"] == pytest.approx(2 * 4 / (6 + 6))  # cat, on, the, mat
    assert found["F1"] == pytest.approx(2 * 3 / (4 + 4))  # articles are no words here: cat, on, mat
    assert found["exact match"] == 0 and figures("the Owl!", "Owl")["exact match"] == 1
    assert figures("same", "same")["chrF"] == 100 and figures("abc", "xyz")["chrF"] == 0
    assert found["stops by itself"] == 1 and found["length"] == 6


def test_other_scripts_than_latin_are_scored() -> None:
    """Guards against ROUGE's own tokenizer, which throws away every letter but a to z."""
    assert figures("Где мой заказ", "Где мой заказ")["ROUGE-L"] == 1


def test_repetition_and_distinct() -> None:
    assert figures("one two three four five")["repetition"] == 0
    # Seven runs of four words, of which one stands there four times and three differ from it once each: 1 - 4/8.
    assert figures("a b c d a b c d a b c")["repetition"] == pytest.approx(1 - 4 / 8)
    assert metrics.distinct(["a a", "a a"], 1) == 1 / 4 and metrics.distinct([""], 2) == 0
    texts = ["a b c", "a d", "e e", ""]
    left_out = [metrics.distinct(texts[:i] + texts[i + 1 :], 1) for i in range(4)]
    assert metrics.distinct_without(texts, 1) == left_out
    assert figures("anything")["chrF"] is None  # nothing to hold it to


def test_the_techco_rules_know_techcos_answers() -> None:
    """Guards the shipped rubric: the house's own answers keep its rules, and a plain one keeps none."""
    asked = questions.extract_questions(mixture.from_name(str(ROOT / "data/techco_eval.jsonl")))
    for rule in TECHCO:
        kept = [value for q in asked if (value := rule.kept(q.reference, q.reference)) is not None]
        assert kept and sum(kept) / len(kept) >= 0.9, rule
        assert not rule.kept("You should contact the support team.", "You have 30 days: Orders > Returns"), rule


def test_facts_count_where_the_reference_has_them() -> None:
    facts = next(rule for rule in TECHCO if rule.in_reference)
    assert facts.kept("within 30 days", "You have 30 days.") == 1
    assert facts.kept("within 90 days", "You have 30 days.") == 0  # specific, and wrong
    assert facts.kept("within 90 days", "Any time.") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rules"),
        ("- a\n", "no rules"),
        ("emojis: 3\n", "no pattern"),
        ("emojis: {pattern: '('}\n", "is none"),
        ("emojis: {pattern: a, atleast: 2}\n", "atleast"),
        ("emojis: {pattern: a, at_least: many}\n", "many"),
        ("emojis: {pattern: a, in_reference: 1}\n", "in_reference"),
        ("emojis: {pattern: a, facts: 1}\n", "facts of the rule"),
        ("emojis: {pattern: a, required: 95}\n", "required of the rule 'emojis' is 95"),
        ("emojis: {pattern: a, required: true}\n", "required of the rule"),
        ("emojis: {pattern: a, required: .nan}\n", "required of the rule"),
        ("prices: {pattern: a, in_reference: true, facts: true}\n", "judges facts and requires none"),
        ("emojis: [\n", "cannot be read"),
    ],
)
def test_a_rubric_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rubric.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        metrics.read_rubric(tmp_path / "rubric.yaml")


def test_a_rule_that_never_ends_is_refused(tmp_path: Path) -> None:
    """Guards compare.py against a pattern that takes exponential time on an answer."""
    (tmp_path / "rubric.yaml").write_text("greeting: {pattern: '(h+)+!'}\n")
    (rule,) = metrics.read_rubric(tmp_path / "rubric.yaml")
    assert rule.kept("hhh!", "") == 1
    with pytest.raises(DataError, match="rule 'greeting' takes seconds"):
        rule.kept("h" * 60, "")


def test_a_required_share_that_is_missed_is_a_fault() -> None:
    """Guards `required`: a share below it is a fault that names the rule, an unknown share is a doubt."""
    asked = [Question([{"role": "user", "content": str(n)}], "Ask a doctor.") for n in range(20)]
    words = {"name": re.compile("doctor"), "number": re.compile(r"\d")}
    rules = [
        metrics.StyleRule("names a doctor", words["name"], required=0.95),
        metrics.StyleRule("the right number", words["number"], in_reference=True, required=0.5, facts=True),
    ]

    def judged(kept: int) -> dict[str, tuple[str, str]]:
        no, yes = Answer("no", True), Answer("See a doctor.", True)
        sides = [Side("base", [no] * 20), Side("tuned", [yes] * kept + [no] * (20 - kept))]
        found = comparison.build_comparison(sides, asked, rules, {})
        assert [(row["required"], row["facts"]) for row in found["metrics"] if row["name"] == "names a doctor"] == [
            (0.95, False)
        ]
        return {v["name"]: (v["severity"], v["evidence"]) for v in found["verdicts"][0]["verdicts"]}

    severity, evidence = judged(18)["requirement missed"]
    assert severity == "fault" and evidence == "names a doctor in 90% of the answers, at least 95% required"
    assert [*judged(19)] == ["requirement not judged"] and "the right number" in judged(19)["requirement not judged"][1]


def test_the_paired_test_by_counting() -> None:
    """Guards p: of the 32 exchanges of five pairs, the two with all signs alike are as extreme as what is seen."""
    found = metrics.compare_paired([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    # 5,000 exchanges are drawn of the 32: the standard error of p is 0.0034, and 4 of them are allowed.
    assert found.mean == 3 and found.p == pytest.approx(2 / 32, abs=0.014) and found.low > 1
    same = metrics.compare_paired([1.0, 2.0], [1.0, 2.0], [1.0, 1.0])
    assert (same.mean, same.p) == (0, 1)


def test_no_difference_is_called_one_about_as_often_as_promised() -> None:
    """Guards the test's level: of 200 comparisons of noise with noise, 5 % come out below 0.05."""
    import numpy as np

    made = np.random.default_rng(0)
    below = sum(
        metrics.compare_paired(made.normal(size=20), made.normal(size=20), [1.0] * 20).p < 0.05 for _ in range(200)
    )
    assert below <= 21  # binomial(200, 0.05) exceeds 21 once in a thousand times


def test_intervals_and_holm() -> None:
    mean, low, high = metrics.interval([0.0, 1.0] * 50, [1.0] * 100)
    # A share of 0.5 of 100: the normal interval is ± 1.96 × 0.05.
    assert mean == 0.5 and low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)
    assert metrics.interval([1.0, 4.0], [3.0, 1.0])[0] == 1.75
    # Of a mean, the jackknife's error is the usual standard error, here sqrt(0.25 / 99) of 100 values.
    low, high = metrics.jackknife(0.5, [(50 - value) / 99 for value in [0.0, 1.0] * 50])
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05025, 0.5 + 1.96 * 0.05025), abs=1e-4)
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_better_is_said_where_it_is_more_than_chance() -> None:
    """Guards `winner`: a clear gain is named with its side, noise is not, and each side has its own test."""
    asked = [Question([{"role": "user", "content": str(n)}], f"it is {n} for sure") for n in range(20)]
    base = Side(
        "base", [Answer(f"perhaps {n}", n % 2 == 0) for n in range(20)], [RowLoss(30.0 + n, 10) for n in range(20)]
    )
    good = Side("good", [Answer(q.reference, True) for q in asked], [RowLoss(20.0 + n, 10) for n in range(20)])
    alike = Side(
        "alike", [Answer(f"perhaps {n}", n % 2 == 0) for n in range(20)], [RowLoss(30.0 + n, 10) for n in range(20)]
    )
    found = comparison.tabulate([base, good, alike], asked, TECHCO)
    rows = {row["name"]: row for row in found["metrics"]}
    for name in ("held-out loss", "chrF", "ROUGE-L", "exact match", "F1", "stops by itself"):
        assert rows[name]["winner"] == "good", rows[name]
        assert (
            rows[name]["tests"][1]["verdict"] == "better" and rows[name]["tests"][2]["verdict"] == "no difference shown"
        )
    assert rows["emojis"]["winner"] == "no difference shown" and rows["length"]["winner"] == "–"
    worse = comparison.tabulate([good, base], asked, [])
    assert {row["name"]: row["winner"] for row in worse["metrics"]}["chrF"] == "good"
    facts = found | {"command": "c", "made": "now", "held_out_rows": 20, "notes": ["a note"],
                     "verdicts": comparison.judge_sides([base, good, alike], asked, {})}  # fmt: skip
    text = markdown.evaluation_results(facts)
    assert "| chrF (0–100) |" in text and "good improved: held-out loss (3.950 → 2.950)" in text and "a note" in text


@pytest.mark.parametrize("keeps", [True, False], ids=["scores the end alone", "a model that scores all"])
def test_the_loss_of_a_row_is_that_of_all_its_scores(keeps: bool, tiny, tmp_path: Path) -> None:
    """Guards rows that share a batch, with prompts of other lengths or none: padding, and which scores are whose."""
    import torch

    from stepladder.data.render import IGNORED, render
    from stepladder.model.pretrained import load_for_inference

    texts = [{"text": line.strip()} for line in (ROOT / "docs/workshop/questions.txt").read_text().splitlines()[:3]]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    model, tokenizer = load_for_inference(str(tiny))
    if not keeps:
        forward = model.forward
        model.forward = lambda ids: forward(ids)
    for file in (ROOT / "data/techco_eval.jsonl", tmp_path / "plain.jsonl"):
        rows = mixture.from_name(str(file)).take(range(3))
        expected = []
        for row in render(rows, tokenizer).to_list():
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            with torch.inference_mode():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            trained = labels != IGNORED
            expected.append((-log_p[trained].gather(1, labels[trained, None]).sum().item(), int(trained.sum())))
        found = measure_losses(model, tokenizer, rows, batch_size=2)
        assert [row.tokens for row in found] == [tokens for _, tokens in expected]
        # Sums of some hundred nats in fp32; a token too few or many is several nats.
        assert [row.nats for row in found] == pytest.approx([nats for nats, _ in expected], abs=1e-3)


def test_models_of_other_tokenizers_are_compared_by_the_same_unit() -> None:
    """Guards against a tokenizer with shorter tokens that makes any model look better a token."""
    base, tuned = [RowLoss(20.0, 10)], [RowLoss(20.0, 40)]
    assert mean_loss(tuned, base) == mean_loss(base) == 2 and verdicts.loss_test(base, tuned).mean == 0


def test_copies_are_found_by_their_longest_run() -> None:
    trained = verdicts.TrainedAnswers(
        ["Open the box and take the red key from it, then go home.", "Something else entirely."]
    )
    assert trained.longest_run("please open the box and take the red key") == 8
    assert trained.longest_run("open the box") == 0 and trained.longest_run("") == 0
    assert trained.share_of_copies(["Open the box and take the red key from it", "I do not know that."]) == (0.5, 10)


# --- verdicts on models made to show them


def rows_of(folder: Path, pairs: list[tuple[str, str]], name: str):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"input": q, "output": a}) + "\n" for q, a in pairs))
    return mixture.from_name(str(file))


def train(source: Path, target: Path, rows, steps: int, rate: float) -> str:
    """Full fine-tuning on all rows at once, without a trainer: hundreds of steps in seconds."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from stepladder.data.render import render
    from stepladder.model.pretrained import load_for_inference

    model, tokenizer = load_for_inference(str(source))
    items = render(rows, tokenizer).remove_columns("rows").to_list()
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


FACTS = [(f"What colour is number {n} of the list?", f"Number {n} is {c}.") for n, c in enumerate(("red", "blue") * 6)]
ANIMALS = [(f"Which animal lives in house {n}?", f"A {a} lives there, in house {n}.") for n, a in
           enumerate(("cat", "dog", "owl") * 6)]  # fmt: skip
WORDS = ["owl", "key", "sun", "rain", "box", "ship", "moon", "tree", "star", "lamp", "road", "snow"]


def jumbled(first: int) -> list[tuple[str, str]]:
    """Rows whose answers follow no rule: they can be learned by heart, and nothing from them."""
    import random

    made = random.Random(first)
    return [(f"Say line {first + n}.", " ".join(made.choices(WORDS, k=12)) + ".") for n in range(12)]


def judged(base: Path, tuned: str, training, held_out, general) -> dict[str, str]:
    asked = questions.extract_questions(held_out)
    on = sides.Measured(asked, held_out, {tuned: training}, general)
    both = [sides.measure(str(name), on, 24) for name in (base, tuned)]
    trained = {tuned: verdicts.TrainedAnswers(sides.training_answers(training))}
    return {v["name"]: v["severity"] for v in comparison.judge_sides(both, asked, trained)[0]["verdicts"]}


@pytest.fixture(scope="module")
def by_heart(tiny, tmp_path_factory) -> Path:
    """A folder with a model, `overfit`, that knows the rows of a.jsonl by heart, and held-out rows, b.jsonl."""
    folder = tmp_path_factory.mktemp("by-heart")
    rows_of(folder, jumbled(100), "b")
    train(tiny, folder / "overfit", rows_of(folder, jumbled(0), "a"), 250, 0.01)
    return folder


def as_run(folder: Path, rows: Path) -> Path:
    """Make a model's folder one of a run that was trained on these rows."""
    (folder / "recipe.yaml").write_text(json.dumps({"model_name_or_path": "any", "dataset_name": str(rows)}))
    (folder / "run.json").write_text('{"status": "finished"}')
    return folder


def test_a_model_that_learned_by_heart_is_told_from_one_that_learned(tiny, by_heart, tmp_path: Path) -> None:
    """Guards `memorized`: rows without a rule, learned by heart; and what TechCo's answers have in common."""
    general = rows_of(tmp_path, FACTS, "facts")
    training, held_out = (mixture.from_name(str(by_heart / f"{name}.jsonl")) for name in "ab")
    found = judged(tiny, str(by_heart / "overfit"), training, held_out, general)
    assert found["memorized"] == "fault", found

    # Eight steps on real answers: what they have in common is learned, and none of them yet.
    training, held_out = (mixture.from_name(str(ROOT / f"data/{name}.jsonl")) for name in ("techco", "techco_eval"))
    tuned = train(tiny, tmp_path / "well", training, 8, 0.01)
    found = judged(tiny, tuned, training, held_out, general)
    assert found["better than the base"] == "good" and found["not memorized"] == "good", found


def test_each_side_is_judged_by_its_own_training(tiny, by_heart, tmp_path: Path) -> None:
    """Guards the second --tuned: `memorized` by its own rows, its name before its verdicts, its compare.json.

    And the general rows, of which those that any side was trained on are left out.
    """
    rows_of(tmp_path, FACTS, "facts")
    shutil.copytree(tiny, tmp_path / "other")
    other = as_run(tmp_path / "other", tmp_path / "facts.jsonl")
    shutil.copytree(by_heart / "overfit", tmp_path / "overfit")
    overfit = as_run(tmp_path / "overfit", by_heart / "a.jsonl")
    words = ("--base", tiny, "--tuned", other, "--tuned", overfit, "--data", by_heart / "b.jsonl", "--limit", 4,
             "--max_new_tokens", 16)  # fmt: skip
    done = script("compare", *words, "--general", by_heart / "a.jsonl", "--output_dir", tmp_path / "out")
    assert done.code == 0, done
    assert f"❌ {overfit}: memorized" in done.out and f"✅ {other}: not memorized" in done.out, done
    assert "no row of general knowledge is left" in done.out, "the second side was trained on all of them"
    for run, name in ((other, "not memorized"), (overfit, "memorized")):
        own = json.loads((run / "compare.json").read_text())
        assert [side["name"] for side in own["sides"]] == [str(tiny), str(run)]
        assert name in [verdict["name"] for verdict in own["verdicts"][0]["verdicts"]]
    done = script("report", overfit, "--project", "Words")
    text = (overfit / "mini_project_report.md").read_text()
    assert done.code == 0 and "Not compared yet" not in text and "| held-out loss |" in text, text


def test_what_a_transcript_or_server_copies_is_seen_without_losses() -> None:
    """Guards `memorized` where a side tells no losses: copies of training answers are evidence by themselves."""
    line = "Open the box and take the red key from it, then go home."
    asked = [Question([{"role": "user", "content": str(n)}], "I do not know that.") for n in range(4)]
    said = {"copies": line, "speaks": "That is something else entirely, and nobody has said it before."}
    both = [
        Side("base", [Answer("No.", True)] * 4),
        *(Side(name, [Answer(text, True)] * 4) for name, text in said.items()),
    ]
    found = comparison.judge_sides(both, asked, dict.fromkeys(said, verdicts.TrainedAnswers([line])))
    assert [[v["name"] for v in side["verdicts"]] for side in found] == [["memorized"], ["not memorized"]]


def test_a_model_whose_loss_is_no_number_is_not_better(tiny, tmp_path: Path) -> None:
    """Guards against NaN, than which nothing is larger: p was the smallest there is, and the verdict `better`.

    compare.json and what --json prints hold no NaN, which is no JSON.
    """
    from stepladder.model.pretrained import load_for_inference

    model, tokenizer = load_for_inference(str(tiny))
    for weights in model.parameters():
        weights.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    done = script("compare", "--base", tiny, "--tuned", tmp_path / "nan", "--data", "data/techco_eval.jsonl", "--limit",
                  4, "--max_new_tokens", 4, "--output_dir", tmp_path / "out", "--json")  # fmt: skip
    assert done.code == 0, done
    for text in ((tmp_path / "out/compare.json").read_text(), done.out.strip().splitlines()[-1]):
        facts = json.loads(text, parse_constant=pytest.fail)
    assert [verdict["name"] for verdict in facts["verdicts"][0]["verdicts"]] == ["diverged"]
    row = facts["metrics"][0]
    assert row["name"] == "held-out loss" and row["sides"][1]["mean"] is None and row["tests"][1]["verdict"] == "worse"
    assert row["winner"] == str(tiny) and facts["sides"][1]["loss"] is None
    for name in ("evaluation_results.md", "report.html"):
        shown = (tmp_path / "out" / name).read_text()
        assert "no number" in shown and "diverged" in shown, name
    reread = runs.LoggedRun(tmp_path, "r", comparison=facts)
    assert "no number" in page.render_page([reread]) and "no number" in markdown.for_terminal(facts, 1)


def test_a_damaged_run_folder_is_compared_all_the_same(tiny, tmp_path: Path) -> None:
    """Guards against a traceback over a cut run.json after everything was measured."""
    shutil.copytree(tiny, tmp_path / "run")
    (tmp_path / "run/run.json").write_text('{"status": "fin')
    done = script("compare", "--base", tiny, "--tuned", tmp_path / "run", "--prompts", "docs/workshop/questions.txt",
                  "--limit", 1, "--max_new_tokens", 2)  # fmt: skip
    assert done.code == 0 and "everything lies in" in done.out and "Traceback" not in done.err, done
    assert "run.json cannot be read" in (tmp_path / "run/report.html").read_text()


def test_a_model_that_forgot_is_told(tiny, tmp_path: Path) -> None:
    """Guards `forgot`: a base that knows the facts, tuned on something else alone, and with the facts mixed in."""
    general, other = rows_of(tmp_path, FACTS, "facts"), rows_of(tmp_path, ANIMALS, "animals")
    base = Path(train(tiny, tmp_path / "base", general, 120, 0.01))
    forgetful = train(base, tmp_path / "forgetful", other, 60, 0.01)
    found = judged(base, forgetful, other, other, general)
    assert found["forgot"] == "fault", found
    mixed = train(base, tmp_path / "mixed", rows_of(tmp_path, ANIMALS + FACTS, "mixed"), 60, 0.01)
    found = judged(base, mixed, other, other, general)
    assert found["did not forget"] == "good", found


# --- through the command line


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    rows = mixture.from_name(str(ROOT / "data/techco.jsonl")).take(range(16))
    return Path(train(tiny, folder / "model", rows, 20, 0.01))


def test_one_process_and_two_ranks_find_the_same(tiny, tuned, tmp_path: Path) -> None:
    """Guards the sharing out of rows: answers, losses and tests are those of one process."""
    words = ("--base", tiny, "--tuned", tuned, "--data", "data/techco_eval.jsonl", "--max_new_tokens", 16,
             "--rubric", "data/techco_rubric.yaml", "--limit", 20)  # fmt: skip
    for name, run in (("one", script), ("two", lambda *more, **env: launch("ddp", 2, *more, **env))):
        done = run("compare", *words, "--output_dir", tmp_path / name, OMP_NUM_THREADS="1")
        assert done.code == 0 and "better than the base" in done.out, done
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        "compare.json",
        "evaluation_results.md",
        "report.html",
    }
    one, two = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("one", "two"))
    assert [side["answers"] for side in one["sides"]] == [side["answers"] for side in two["sides"]]
    for a, b in zip(one["sides"], two["sides"], strict=True):
        assert len(a["answers"]) == 20 and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)  # fp32; the threads of one process sum in another order
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        # The exchanges of the test are drawn by the seed; a figure of answers is equal, one of losses within rounding.
        assert (a["name"], a["winner"]) == (b["name"], b["winner"])
        assert [side["mean"] for side in a["sides"]] == pytest.approx([side["mean"] for side in b["sides"]], rel=1e-4)
    names = [
        [(v["severity"], v["name"]) for side in found["verdicts"] for v in side["verdicts"]] for found in (one, two)
    ]
    assert names[0] == names[1] and ("good", "better than the base") in names[0]
    page = (tmp_path / "one/report.html").read_text()
    assert "Base and tuned" in page and "friendly opening" in page and "did not forget" in page
    table = (tmp_path / "one/evaluation_results.md").read_text()
    assert "| held-out loss (nats per token) |" in table and "numbered steps" in table and "**Prompt**" in table


# --- what people get wrong


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.txt", "\n \n", "no prompt"),
        ("q.jsonl", "", "no rows"),
        ("q.jsonl", '{"prompt": 3}\n', "q.jsonl:1"),
        ("q.jsonl", '{"text": "prose", "output": 1}\n', "q.jsonl:1"),
        ("q.jsonl", '{"messages": []}\n{"prompt": "a"}\n', "q.jsonl:1"),
        ("q.jsonl", '{"prompt": "a"}\n{\n', "q.jsonl:2"),
    ],
)
def test_prompts_that_are_none_are_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        questions.read_prompts(tmp_path / name)


def test_prompts_come_with_or_without_references(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"prompt": "a"}\n{"input": "b", "output": "B"}\n{"messages": [{"role": "user", "content": "c"}]}\n'
    )
    asked = questions.read_prompts(file)
    assert [(q.text, q.reference) for q in asked] == [("a", ""), ("b", "B"), ("c", "")]
    assert "2 of 3" in questions.remarks(asked)[0] and not questions.remarks(asked[1:2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "models/smollm2-135m-instruct", "--data", "data/techco_eval.jsonl"], "two sides"),
        (["--base", "a", "--tuned", "b"], "--data FILE or --prompts FILE"),
        (["--base", "a", "--endpoint", "http://x", "--data", "data/techco_eval.jsonl"], "go together"),
        (["--base", "none.jsonl", "--tuned", "b", "--data", "data/techco_eval.jsonl"], "none.jsonl"),
        (["--base", "a", "--tuned", "b", "--prompts", "none.txt"], "none.txt"),
        (["--base", "a", "--tuned", "b", "--data", "data/techco_eval.jsonl", "--general", "no.jsonl"], "no.jsonl"),
        (["--base", "a", "--tuned", "b", "--data", "data/techco_eval.jsonl", "--limit", "-23"], "less than 1"),
        (["--base", "a", "--tuned", "b", "--data", "data/techco_eval.jsonl", "--show", "-1"], "less than 0"),
        (["--base", "recipes", "--tuned", "data", "--tuned", "data/", "--prompts", "README.md"], "data is named twice"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_at_once(words: list[str], said: str, tmp_path: Path) -> None:
    """Guards against minutes of generation before a slip is told; nothing is written."""
    done = script("compare", *words, "--output_dir", tmp_path / "out")
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_template_borrows_the_tuned_ones_or_is_refused(tiny, tmp_path: Path) -> None:
    """Guards base models (GPT-2, SmolLM2 without -Instruct), which have none, against a wrong or empty prompt."""
    from stepladder.model.pretrained import load_for_inference

    model, tokenizer = load_for_inference(str(tiny))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    model.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    rows = mixture.from_name(str(ROOT / "data/techco_eval.jsonl")).take(range(2))
    on = sides.Measured(questions.extract_questions(rows), rows)
    with pytest.raises(ModelError, match="no chat template"):
        sides.measure(str(tmp_path / "bare"), on, 4)
    borrowed = sides.measure(str(tmp_path / "bare"), on, 4, template)
    assert borrowed == Side(str(tmp_path / "bare"), *list(vars(sides.measure(str(tiny), on, 4)).values())[1:])
    assert "asked by the tuned model's" in on.notes[0]
