"""Chapters 4 to 6 of the workshop: data, judging, reading configurations and models, merging."""

from __future__ import annotations

import json

from played import Played


def test_4_1_data_set_preparation(played: Played) -> None:
    """20 rows pass; each kind of flaw is found at its row."""
    clean, flawed = played.outputs
    assert "Dataset valid! 20 examples" in clean
    for place in ("17, as", "20", "21: columns", "22:44: invalid JSON", "18: input too short", "19: output too short"):
        assert f"flawed.jsonl:{place}" in flawed, place


def test_4_3_base_against_tuned(played: Played) -> None:
    """The evaluation table is filled, each style rule with its share and interval; the project report too."""
    folder = played.folder / "runs/techco"
    table = (folder / "evaluation_results.md").read_text()
    assert "friendly" in table.lower() and "held-out" in table.lower() and "nan" not in table
    assert "Customer support" in (folder / "mini_project_report.md").read_text()


def test_5_1_read_a_configuration(played: Played) -> None:
    """Each key is explained; the import refuses what it cannot say, and with --force writes a recipe."""
    explained, refused, forced = played.outputs
    assert "micro_batch_size: 1" in explained and "datasets[0].type: openhermes is not supported" in refused
    assert (played.folder / "runs/from-axolotl.yaml").is_file(), forced


def test_5_2_explore_models(played: Played) -> None:
    """A model and an adapter say what they are."""
    model, _, adapter = played.outputs
    assert "134,515,008 parameters" in model and "LoRA" in adapter and "models/tiny" in adapter


def test_6_3_lora_and_merging(played: Played) -> None:
    """The merged model answers as base and adapter do: the proof stands in merge.json."""
    proof = json.loads((played.folder / "merged/workshop/merge.json").read_text())
    assert proof and (played.folder / "merged/workshop/model.safetensors").is_file()
    assert played.outputs[2].strip()
