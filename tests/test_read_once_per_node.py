"""Under FSDP rank 0 alone reads the weights, and what it sends is what one process trains."""

from __future__ import annotations

import pickle
import types
from pathlib import Path
from typing import Any

import measure_load
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import same_curve
from conftest import losses
from stepladder import hardware
from stepladder.errors import ModelError
from stepladder.model import attention
from stepladder.planning import choose
from stepladder.recipe import load
from stepladder.training.launch import weight_sending
from stepladder.training.launch.launcher import Strategy

KEYS = {
    "max_steps": 2, "eval_strategy": "no", "eval_dataset_name": None, "learning_rate": 1e-3, "max_length": 256,
    "per_device_train_batch_size": 1, "global_batch_size": 4,
}  # fmt: skip
LARGE = ("full of bf16", "lora of bf16")  # large enough to be measured


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: a random Llama of 27 million parameters in bf16 with a head of its own; the tiny model with two
    matrices where its configuration ties them; an adapter on the tiny model that is not as it begins."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "large")
    untied = AutoModelForCausalLM.from_pretrained(tiny)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone() * 1.5)
    untied.save_pretrained(folder / "untied")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder / "adapter")
    experts = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(experts).save_pretrained(folder / "experts")
    for name in ("large", "untied", "experts"):
        tokenizer.save_pretrained(folder / name)
    return {"tiny": tiny, **{name: folder / name for name in ("large", "untied", "experts", "adapter")}}


def cases(models: dict[str, Path], rows: Path) -> dict[str, dict[str, Any]]:
    """Recipes by what they are for."""
    lora = same_curve.METHODS["lora"]
    keys = {
        "tied": ("full", "tiny", {}),
        "untied, whatever the configuration": ("full", "untied", {}),
        "tokens added": ("full", "tiny", {"chat_template": "gemma"}),
        "full in bf16": ("full", "large", {"dtype": "bfloat16", "bf16": True}),
        "an adapter trained on": ("lora", "adapter", dict.fromkeys(lora) | {"use_peft": True}),
        "dora": ("lora", "tiny", {"use_dora": True}),
        "experts with a loss of their own": ("full", "experts", {}),
        **{case: (case.split()[0], "large", {}) for case in LARGE},
    }  # fmt: skip
    return {
        case: {
            key: value
            for key, value in (same_curve.recipe_keys(method, models[model], rows) | KEYS | more).items()
            if value is not None
        }
        for case, (method, model, more) in keys.items()
    }


@pytest.mark.proof
def test_one_rank_reads(models: dict[str, Path], tmp_path: Path) -> None:
    """Guards large models under FSDP: 8 ranks that load 70 billion parameters in fp32 each would need 2.3 TB; and that
    what rank 0 sends is what a plain process trains: tied weights, added tokens, buffers, adapters, and the outputs of
    routers, which only the rank that had made the model recorded."""
    rows, recipes = same_curve.write_rows(tmp_path / "rows.jsonl"), {}
    for case, keys in cases(models, rows).items():
        recipes[case] = tmp_path / f"{case}.yaml"
        recipes[case].write_text(yaml.safe_dump(keys))
    for config, ranks in (("plain", 1), ("fsdp", 2)):
        jobs = []
        for case, recipe in recipes.items():
            argv = ["--recipe", str(recipe), "--output_dir", str(tmp_path / config / case)]
            log = str(tmp_path / f"{config} {case}.log")
            jobs.append({"argv": argv, "port": same_curve.free_port(), "log": log, "one_reader": True})
        same_curve.launch_many(config, ranks, jobs, tmp_path / "jobs.json", script="tests/measure_load.py")
    for case in recipes:
        log = (tmp_path / f"fsdp {case}.log").read_text()
        near = 2e-2 if case.endswith("in bf16") else 1e-5
        assert losses(tmp_path / "fsdp" / case) == pytest.approx(losses(tmp_path / "plain" / case), abs=near), log
        assert "each rank reads" not in log
    size = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(models["large"]).parameters())
    for case in LARGE:
        _, (first, second) = measure_load.peaks(tmp_path / f"fsdp {case}.log", 2)
        assert first / size < 1.8 and second / size < 0.85, (case, first / size, second / size)
        plan = choose.Plan(load.load(str(recipes[case]), []), 1, 2, hardware.device("h100"))
        assert plan.candidate(Strategy("fsdp"), 1, False).memory.host / size == pytest.approx(1, abs=0.05)


def test_what_another_rank_builds(tiny: Path) -> None:
    """Guards what a rank without weights starts from: the model that rank 0 has read, with its buffers' values and ties
    and no memory for weights; kernels that it cannot load are an error before the first step. Where a model cannot be
    sent, there is None, at which each rank reads."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.register_buffer("seen", torch.arange(3))
    built = pickle.loads(weight_sending.copy_without_weights(model) or b"")
    assert {each.device.type for each in built.parameters()} == {"meta"} and model.lm_head.weight.device.type == "cpu"
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert built.generation_config.to_dict() == model.generation_config.to_dict()
    for (name, ours), (theirs, buffer) in zip(built.named_buffers(), model.named_buffers(), strict=True):
        assert name == theirs and torch.equal(ours, buffer)
    AttentionInterface.register("own", sdpa_attention_forward)
    model.set_attn_implementation("own")
    built = pickle.loads(weight_sending.copy_without_weights(model) or b"")
    del AttentionInterface._global_mapping["own"]
    with pytest.raises(ModelError, match="this rank cannot load it"):
        attention.set_implementation(built, "own")
    model.forward = types.MethodType(lambda self: None, model)
    assert weight_sending.copy_without_weights(model) is None
