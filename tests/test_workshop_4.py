"""Chapters 4 to 6 of the workshop: data, judging, reading configurations and models, merging."""

from __future__ import annotations

import json
import re

import pytest

from played import Played

pytestmark = pytest.mark.proof


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
    assert played.outputs[-1].strip()


def test_4_3_base_against_tuned(played: Played) -> None:
    """The evaluation table is filled, each style rule with its share and interval; the project report too."""
    folder = played.folder / "runs/techco"
    table = (folder / "evaluation_results.md").read_text()
    assert "friendly" in table.lower() and "held-out" in table.lower() and "nan" not in table
    assert "Customer support" in (folder / "mini_project_report.md").read_text()


def test_4_4_overfit(played: Played) -> None:
    """The verdicts tell the bad configuration from the good one, side by side in one page."""
    judged = dict(
        line.split(": ", 1) for line in played.outputs[2].splitlines() if line.startswith(("overfit:", "good:"))
    )
    assert "overfitting" in judged["overfit"] or "memorized" in judged["overfit"], judged
    assert "overfitting" not in judged["good"] and "memorized" not in judged["good"], judged
    assert (played.folder / "runs/overfit-and-good.html").is_file()


def test_4_5_out_of_memory(played: Played) -> None:
    """Five strategies beside the baseline, ranked by what each was measured to save."""
    rows = [line.split() for line in played.outputs[-1].splitlines()[1:]]
    peaks = [float(row[1]) for row in rows]
    assert {row[0] for row in rows} == {
        f"mem-{name}" for name in ("baseline", "8bit", "micro1", "accumulation", "checkpointing", "smaller")
    }
    assert peaks == sorted(peaks)
    saved = {row[0]: int(row[2].rstrip("%")) for row in rows}
    assert saved["mem-accumulation"] > 0 and saved["mem-checkpointing"] > 0 and saved["mem-smaller"] > 0, rows


def test_4_6_forgetting(played: Played) -> None:
    """Forgetting of six runs, each one factor from another (what it means: test_a_model_that_forgot_is_told)."""
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in played.outputs[-1].splitlines()[2:]}
    assert [*rows] == [
        f"forget-{name}" for name in ("full-high", "full-low", "lora-high", "lora", "lora-longer", "lora-mixed")
    ]
    assert rows["forget-full-high"][0] < rows["forget-full-low"][0]  # four steps: the higher rate has learned more
    mixed = played.run("forget-lora-mixed")["datasets"]
    assert any("general" in data["name"] for data in mixed), mixed


def test_4_7_mini_project(played: Played) -> None:
    """Three domains are trained, and the report of the first is filled in."""
    assert "Dataset valid! 40 examples" in played.outputs[0]
    report = played.outputs[4]
    assert "Medical Q&A" in report and "{" not in report and "Production" in report, report
    assert [line.split()[0] for line in played.outputs[-1].splitlines()[1:4]] == ["medical", "code_docs", "social"]


def test_5_1_read_a_configuration(played: Played) -> None:
    """Each key is explained; the import refuses what it cannot say, and with --force writes a recipe."""
    explained, refused, forced = played.outputs
    assert "micro_batch_size: 1" in explained and "datasets[0].type: openhermes is not supported" in refused
    assert (played.folder / "runs/from-axolotl.yaml").is_file(), forced


def test_5_2_explore_models(played: Played) -> None:
    """A model and an adapter say what they are."""
    model, _, adapter = played.outputs
    assert "134,515,008 parameters" in model and "LoRA" in adapter and "models/tiny" in adapter


def test_5_3_serve_and_compare(played: Played) -> None:
    """One server answers for both models, and is a side of the comparison."""
    said = played.outputs[4]
    assert "> models/smollm2-135m-instruct" in said and "> merged/served" in said
    sides = json.loads((played.folder / "runs/served/compare.json").read_text())["sides"]
    assert [len(side["answers"]) for side in sides] == [2, 2] and "loss" not in sides[1]


def test_6_1_chat_templates(played: Played) -> None:
    """Each format's own marks; the call of a tool is trained, and what the tool says is not."""
    chatml, mistral, llama, tools = played.outputs
    assert "<|im_start|>user" in chatml and "[INST]" in mistral and "<|start_header_id|>user" in llama
    trained = re.findall(r"⟦(.*?)⟧", tools, re.DOTALL)
    assert any('"name": "track_order"' in part for part in trained)
    assert "tool_response" in tools and not any("tool_response" in part for part in trained)


def test_6_2_packing_and_monitoring(played: Played) -> None:
    """Packing leaves no padding; the four curves are in the logs, and the report has a verdict of each run."""
    assert played.run("packed")["totals"]["padding"] < played.run("unpacked")["totals"]["padding"]
    logged = {key for row in played.metrics("packed") for key in row}
    assert {"loss", "eval_loss", "grad_norm", "learning_rate"} <= logged
    assert "unpacked: " in played.outputs[2] and "packed: " in played.outputs[2]


def test_6_3_lora_and_merging(played: Played) -> None:
    """The merged model answers as base and adapter do: the proof stands in merge.json."""
    proof = json.loads((played.folder / "merged/workshop/merge.json").read_text())
    assert proof and (played.folder / "merged/workshop/model.safetensors").is_file()
    assert played.outputs[2].strip()


def test_6_4_evaluation(played: Played) -> None:
    """The harness's local task, base and tuned side by side."""
    table = played.outputs[1]
    assert "smollm2" in table and "judged" in table, table
    assert "techco_eval" in table and "acc" in table, table
