"""Under FSDP a node reads the weights once: measured, and the same curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import same_curve
from conftest import losses, script
from stepladder import hardware
from stepladder.planning import choose
from stepladder.recipe import load
from stepladder.training.launch import ranks
from stepladder.training.launch.launcher import Strategy

KEYS = {
    "max_steps": 2, "eval_strategy": "no", "eval_dataset_name": None, "learning_rate": 1e-3, "max_length": 256,
    "per_device_train_batch_size": 1, "global_batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def untied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 27 million parameters, saved in bf16, whose head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_other_ranks_hold_no_weights(untied: Path, write_recipe, tmp_path: Path) -> None:
    """Guards full fine-tuning of large models under FSDP: 8 ranks that load 70 billion parameters in fp32 each would
    need 2.3 TB; and that what rank 0 sends is what a plain process trains."""
    rows = same_curve.write_rows(tmp_path / "rows.jsonl")
    jobs = {}
    for method in ("full", "lora"):
        recipe = write_recipe(**same_curve.recipe_keys(method, untied, rows) | KEYS)
        recipe = recipe.rename(tmp_path / f"{method}.yaml")
        argv = ["--recipe", str(recipe), "--output_dir", str(tmp_path / method)]
        jobs[method] = {"argv": argv, "port": same_curve.free_port(), "log": str(tmp_path / f"{method}.log")}
    same_curve.launch_many("fsdp", 2, list(jobs.values()), tmp_path / "jobs.json", script="tests/measure_load.py")
    size = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(untied).parameters())
    loaded = {name: [json.loads(Path(f"{jobs[name]['log']}.{n}.loaded").read_text()) / size for n in (0, 1)]
              for name in jobs}  # fmt: skip
    assert loaded["full"][0] == pytest.approx(1, abs=0.15) and loaded["full"][1] < 0.15, loaded
    assert loaded["lora"] == pytest.approx([1, 1], abs=0.15), "an adapter's base is read by each rank"
    for name, measured in loaded.items():
        plan = choose.Plan(load.load(str(tmp_path / f"{name}.yaml"), []), 1, 2, hardware.device("h100"))
        assert plan.candidate(Strategy("fsdp"), 1, False).memory.host / size == pytest.approx(sum(measured), rel=0.15)

    done = script("sft", "--recipe", tmp_path / "full.yaml", "--output_dir", tmp_path / "plain")
    assert done.code == 0, done
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_what_cannot_be_sent_is_read_by_each_rank(tiny: Path) -> None:
    """Guards against a traceback or a hang out of Accelerate, which sends parameters only and ties what the
    configuration ties, whatever the file held."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert ranks.model_can_be_sent(model)
    model.register_buffer("seen", torch.zeros(1))
    assert not ranks.model_can_be_sent(model)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert not ranks.model_can_be_sent(model)
