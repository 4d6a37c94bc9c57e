"""Chapters 4 to 6 of the workshop: data, judging, reading configurations and models, merging."""

from __future__ import annotations

import json
import re

import pytest

from conftest import ROOT
from played import Played

pytestmark = pytest.mark.proof

QUESTIONS = ("How long does shipping take?", "Can I change my order?", "Do you ship internationally?")
PHASES = {"converged", "still falling", "plateau", "diverged", "too short"}  # what the loss went through


def test_4_1_data_set_preparation(played: Played) -> None:
    """20 rows pass; each kind of flaw is found at its row."""
    clean, flawed = played.outputs
    assert "Dataset valid! 20 examples" in clean
    for place in ("17, as", "20", "21: columns", "22:44: invalid JSON", "18: input too short", "19: output too short"):
        assert f"flawed.jsonl:{place}" in flawed, place


def test_4_2_lora_on_distilgpt2(played: Played) -> None:
    """147,456 trainable parameters on Conv1D's c_attn, under 1 %; the style's answer is made by SmolLM2."""
    counts = played.run("distilgpt2")["parameters"]
    assert counts["trainable"] == 147_456 < counts["all"] / 100
    assert played.run("style")["recipe"]["model_name_or_path"] == "models/smollm2-135m-instruct"
    shown = played.outputs[1]
    assert "### User: How do I reset my password?\n### Assistant:⟦" in shown, shown
    assert all(f"> {question}" in played.outputs[-1] for question in QUESTIONS), played.outputs[-1]


def test_4_3_base_against_tuned(played: Played) -> None:
    """The evaluation table is filled, each style rule with its share and interval; the project report too."""
    folder = played.folder / "runs/techco"
    table = (folder / "evaluation_results.md").read_text()
    assert "friendly" in table.lower() and "held-out" in table.lower() and "nan" not in table
    assert "| friendly opening" in played.outputs[3] and "| Criteria" in played.outputs[3]
    assert "Customer support" in (folder / "mini_project_report.md").read_text()


def test_4_4_overfit(played: Played) -> None:
    """The verdicts tell the bad configuration from the good one, side by side in one page."""
    judged = dict(
        line.split(": ", 1) for line in played.outputs[2].splitlines() if line.startswith(("overfit:", "good:"))
    )
    assert "overfitting" in judged["overfit"] or "memorized" in judged["overfit"], judged
    assert "overfitting" not in judged["good"] and "memorized" not in judged["good"], judged
    assert (played.folder / "runs/overfit-and-good.html").is_file()
    stopped = played.run("overfit-stopped")
    assert stopped["result_step"] == stopped["stopped_early"]["best_step"] < stopped["totals"]["steps"] < 120


def test_4_5_out_of_memory(played: Played) -> None:
    """Five strategies beside the baseline, ranked by what each was measured to save."""
    rows = [line.split() for line in played.outputs[7].splitlines()[1:]]
    peaks = [float(row[1]) for row in rows]
    assert {row[0] for row in rows} == {
        f"mem-{name}" for name in ("baseline", "8bit", "micro1", "accumulation", "checkpointing", "smaller")
    }
    assert peaks == sorted(peaks)
    saved = {row[0]: int(row[2].rstrip("%")) for row in rows}
    assert all(saved[f"mem-{name}"] > 0 for name in ("micro1", "accumulation", "checkpointing", "smaller")), rows
    together = float(re.search(r"^mem-all +([\d.]+)", played.outputs[-1], re.MULTILINE)[1])
    alone = next(peak for row, peak in zip(rows, peaks, strict=True) if row[0] == "mem-accumulation")
    assert together < alone, "all at once take less than the best that keeps the curve"


def test_4_6_forgetting(played: Played) -> None:
    """Forgetting of six runs, each one factor from another, by the loss; of two of them by behaviours, as a gate.

    What it means: test_a_model_that_forgot_is_told, and test_gate.py.
    """
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in played.outputs[-3].splitlines()[2:]}
    assert [*rows] == [
        f"forget-{name}" for name in ("full-high", "full-low", "lora-high", "lora", "lora-longer", "lora-mixed")
    ]
    assert rows["forget-full-high"][0] < rows["forget-full-low"][0]  # four steps: the higher rate has learned more
    mixed = played.run("forget-lora-mixed")["datasets"]
    assert any("general" in data["name"] for data in mixed), mixed
    facts = json.loads((played.folder / "runs/lost/compare.json").read_text())
    assert {claim["claim"] for claim in facts["required"]} == {"better than the base", "did not forget"}
    assert "requirements hold" in played.outputs[-2]
    shown = played.outputs[-1].splitlines()
    assert re.search(r"^does not refuse +\d+%( +\d+% ?[▲▼]?){3}$", played.outputs[-1], re.MULTILINE), shown
    assert [line[:14] for line in shown[-2:]] == ["better than th", "did not forget"] and all("✘" in x or "✔" in x
        for x in shown[-2:]), shown  # fmt: skip


def test_4_7_mini_project(played: Played) -> None:
    """Three domains are trained, and the report of the first is filled in."""
    assert "Dataset valid! 40 examples" in played.outputs[0]
    for name in ("medical", "code_docs", "social"):
        rows = [json.loads(line) for line in (ROOT / f"data/{name}.jsonl").read_text().splitlines()]
        assert len(rows) >= 40, name
        if name == "medical":
            assert all("not medical advice" in row["output"] for row in rows)
    report = played.outputs[4]
    assert "Medical Q&A" in report and "{" not in report and "Production" in report, report
    assert [line.split()[0] for line in played.outputs[-1].splitlines()[1:4]] == ["medical", "code_docs", "social"]


def test_5_1_read_a_configuration(played: Played) -> None:
    """Each key is explained; the import refuses what it cannot say, and with --force writes a recipe."""
    explained, refused, forced, _, trained = played.outputs
    assert "micro_batch_size: 1" in explained and "datasets[0].type: openhermes is not supported" in refused
    assert "The pretrained model that training starts from" in explained, "a sentence on base_model"
    assert (played.folder / "runs/from-axolotl.yaml").is_file(), forced
    facts = played.run("from-axolotl")
    assert facts["status"] == "finished" and facts["micro_batch_size"] == 1, trained
    assert facts["recipe"]["lora_r"] == 32 and facts["gradient_accumulation_steps"] == 2


def test_5_2_explore_models(played: Played) -> None:
    """A model and an adapter say what they are."""
    model, _, _, table = played.outputs
    assert "134,515,008 parameters" in model
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert head[1:] == ["models/smollm2-135m-instruct", "models/distilgpt2-shape", "runs/tiny-adapter"]
    said = {name: cells for name, *cells in rows}
    assert "81,912,576 parameters" in said["size"][1] and "LoRA" in said["method"][2]
    assert said["base model"][2] == "models/tiny" and "techco" in said["data set"][2]


def test_5_3_serve_and_compare(played: Played) -> None:
    """One server answers for both models, and is a side of the comparison."""
    said = played.outputs[4]
    assert "> models/smollm2-135m-instruct" in said and "> merged/served" in said
    sides = json.loads((played.folder / "runs/served/compare.json").read_text())["sides"]
    assert [len(side["answers"]) for side in sides] == [2, 2] and "loss" not in sides[1]


def test_6_1_chat_templates(played: Played) -> None:
    """Each format's own marks; the call of a tool is trained, and what the tool says is not."""
    chatml, mistral, llama, ids, tools = played.outputs
    assert "<|im_start|>user" in chatml and "[INST]" in mistral and "<|start_header_id|>user" in llama
    for text, end in ((chatml, "<|im_end|>"), (mistral, "<|im_end|>"), (llama, "<|eot_id|>")):
        answers = [part.strip() for part in re.findall(r"⟦(.*?)⟧", text, re.DOTALL)]
        assert answers == [f"Hi! How can I help you today?{end}", f"I cannot look outside. Which city?{end}"]
        asked = re.sub(r"⟦.*?⟧", "", text, flags=re.DOTALL)
        assert all(part in asked for part in ("You are a helpful assistant.", "Hello!", "What's the weather?"))
    assert ids.rstrip().endswith("<|im_start|>assistant") and "add_generation_prompt=False: 19 tokens" in ids
    trained = re.findall(r"⟦(.*?)⟧", tools, re.DOTALL)
    assert any('"name": "track_order"' in part for part in trained)
    assert "tool_response" in tools and not any("tool_response" in part for part in trained)


def test_6_2_packing_and_monitoring(played: Played) -> None:
    """Only a padded batch holds padding, and rows end to end give its curve; the report has a verdict of each run.

    0.02 is what rounding to bf16 moves a loss by, where the CPU has units for it.
    """
    padding = {name: played.run(name)["totals"]["padding"] for name in ("padded", "unpacked", "packed")}
    assert padding["padded"] > 0 and padding["unpacked"] == padding["packed"] == 0, padding
    padded, unpacked = (
        [row["loss"] for row in played.metrics(name) if "loss" in row] for name in ("padded", "unpacked")
    )
    assert unpacked == pytest.approx(padded, abs=0.02)
    logged = {key for row in played.metrics("packed") for key in row}
    assert {"loss", "eval_loss", "grad_norm", "learning_rate"} <= logged
    assert all(played.run(name)["totals"]["tokens_per_second"] > 0 for name in padding)
    for name in padding:
        verdict = re.search(rf"^{name}: (.+)$", played.outputs[3], re.MULTILINE)
        assert verdict and set(verdict[1].split(", ")) & PHASES, played.outputs[3]


def test_6_3_lora_and_merging(played: Played) -> None:
    """The merged model answers as base and adapter do: the proof stands in merge.json."""
    proof = json.loads((played.folder / "merged/workshop/merge.json").read_text())["proof"]
    assert proof["exact"]["max"] <= proof["exact"]["bound"], proof
    greedy = proof["greedy"]
    assert greedy["of"] > 0 and greedy["agree"] >= 0.75 * greedy["of"], (
        greedy
    )  # bf16 turns a token where two are as likely
    assert played.outputs[1].strip(), "the adapter itself answers"
    assert (played.folder / "merged/workshop/model.safetensors").is_file()
    assert played.outputs[3].strip()


def test_6_4_evaluation(played: Played) -> None:
    """The harness's local task, base and tuned side by side."""
    table = played.outputs[1]
    assert "smollm2" in table and "judged" in table, table
    scores = re.search(r"techco_eval *│ acc *│ *([\d.]+) ± [\d.]+ *│ *([\d.]+) ± [\d.]+", table)
    assert scores and all(0 <= float(score) <= 1 for score in scores.groups()), table


def test_6_5_adapter_on_adapter(played: Played) -> None:
    """The second run continues the first one's adapter, and `linear` moves the model further than the sum."""
    assert played.run("domain-chat")["starts_from"]["adapter"] == "runs/domain"
    halfway, linear = (
        json.loads((played.folder / f"merged/{name}/merge.json").read_text()) for name in ("halfway", "linear")
    )
    assert halfway["combination"] is None and linear["combination"]["type"] == "linear"
    moves = [facts["proof"]["adapter_moves"]["mean"] for facts in (halfway, linear)]
    assert moves[1] > 1.3 * moves[0], moves
