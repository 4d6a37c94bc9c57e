"""Prefix and prompt tuning: trained, saved, loaded, asked, compared and refused like the other methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import launch, losses, manifest, script
from stepladder.data import mixture
from stepladder.evaluation.generation import generate_answers
from stepladder.evaluation.held_out import mean_loss, measure_losses
from stepladder.model import pretrained
from stepladder.reporting import curves

KINDS = ("prefix", "prompt")


@pytest.fixture(scope="module")
def recipe(tiny: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipes") / "virtual.yaml"
    file.write_text(
        f"model_name_or_path: {tiny}\ndataset_name: {learnable}\nmax_length: 128\nuse_peft: true\n"
        "num_virtual_tokens: 8\nglobal_batch_size: 4\nper_device_train_batch_size: 2\nmax_steps: 6\n"
        "learning_rate: 0.05\nlogging_steps: 1\ngradient_checkpointing: false\nbf16: false\nsave_steps: 3\n"
    )
    return file


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("virtual"), {}
    for kind in KINDS:
        made[kind] = folder / kind
        done = script("sft", "--recipe", recipe, "--peft_type", kind, "--output_dir", made[kind])
        assert done.code == 0 and "merge it" not in done.out, done
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_is_saved_whole(kind: str, trained: dict[str, Path], tiny: Path) -> None:
    """Guards the size by formula, the loss that falls, and that what is loaded again is what was trained."""
    run = trained[kind]
    config = json.loads((tiny / "config.json").read_text())
    width = config["hidden_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    expected = {
        "prefix": 8 * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head,
        "prompt": 8 * width,
    }
    facts, curve = manifest(run), losses(run)
    assert facts["parameters"]["trainable"] == expected[kind]
    assert curve[-1] < curve[0] - 0.05
    model, tokenizer = pretrained.load_for_inference(str(run))
    rows = mixture.from_name(facts["recipe"]["dataset_name"]).take(range(8))
    assert mean_loss(measure_losses(model, tokenizer, rows)) == pytest.approx(facts["saved"]["loss"], abs=1e-5)


def test_it_begins_as_the_base_after_real_words(trained: dict[str, Path]) -> None:
    """Guards the start: the same words, as embeddings or as the keys and values that the layers make of them."""
    prefix, prompt = (losses(trained[kind])[0] for kind in KINDS)
    assert prefix == pytest.approx(prompt, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_answered_like_one(kind: str, trained: dict[str, Path]) -> None:
    """Guards virtual tokens before padded prompts: an answer does not depend on what else is asked."""
    model, tokenizer = pretrained.load_for_inference(str(trained[kind]))
    asked = [[{"role": "user", "content": text}] for text in ("Hi", "Where is my order? It was due last week.")]
    together = generate_answers(model, tokenizer, asked, max_new_tokens=8)
    alone = [generate_answers(model, tokenizer, [messages], max_new_tokens=8)[0] for messages in asked]
    assert together == alone


@pytest.mark.proof
@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_two_ranks_and_a_resumption_have_the_curve_of_one(
    config: str, recipe: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """Guards the same curve, and a checkpoint that holds the virtual tokens and the optimizer's state of them."""
    kind = {"ddp": "prefix", "zero2": "prompt"}[config]
    words = ("--recipe", recipe, "--peft_type", kind, "--output_dir", tmp_path / "run")
    done = launch(config, 2, "sft", *words, "--per_device_train_batch_size", 1, OMP_NUM_THREADS="1")
    # Accelerate's line on the accumulation of two is of what is no fault
    assert done.code == 0 and "mismatch" not in done.out + done.err, done
    one = losses(trained[kind])
    assert losses(tmp_path / "run") == pytest.approx(one, abs=curves.LOSS_TOLERANCE)
    shutil.rmtree(tmp_path / "run/checkpoint-6")  # as one that died between the two
    record = tmp_path / "run/run.json"
    record.write_text(json.dumps(manifest(tmp_path / "run") | {"status": "running"}))
    done = script("sft", *words)
    assert done.code == 0 and losses(tmp_path / "run")[-3:] == pytest.approx(one[-3:], abs=1e-6), done


def test_it_is_compared_and_shown_but_not_merged(trained: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """Guards the ways that lead on from a run: compare, inspect, the card; a merge is refused with the reason."""
    done = script("compare", "--base", tiny, "--tuned", trained["prefix"], "--tuned", trained["prompt"], "--data",
                  "data/techco_eval.jsonl", "--limit", 3, "--max_new_tokens", 8, "--output_dir", tmp_path)  # fmt: skip
    assert done.code == 0, done
    sides = json.loads((tmp_path / "compare.json").read_text())["sides"]
    assert all(side["loss"] > 0 for side in sides) and len({side["loss"] for side in sides}) == 3
    done = script("inspect_model", trained["prefix"])
    assert done.code == 0 and "prefix tuning" in done.out, done
    assert "prompt tuning" in (trained["prompt"] / "README.md").read_text()
    done = script("merge", "--adapter", trained["prompt"], "--output_dir", tmp_path / "merged")
    assert done.code == 2 and "cannot be merged" in done.err and "generate.py" in done.err, done


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--peft_type", "prefix", "--packing", "true"), "only the first would see them"),
        (("--peft_type", "prefix", "--gradient_checkpointing", "true"), "peft_type: prompt"),
        (("--peft_type", "prompt", "--lora_r", "8"), "lora_r has no effect with peft_type: prompt"),
        (("--num_virtual_tokens", "8", "--peft_type", "lora"), "has no effect with peft_type: lora"),
        (("--peft_type", "prefix", "--use_peft", "false"), "has no effect with use_peft: false"),
        (("--peft_type", "p_tuning"), "allowed: lora, ia3, vera, oft, prefix, prompt"),
    ],
)
def test_what_cannot_be_is_refused(flags, said: str) -> None:
    """Guards each rule by the words a person would type."""
    done = script("check", "--recipe", "lora", *flags)
    assert done.code == 2 and said in done.err, done


def test_a_strategy_that_shards_is_refused(recipe: Path, tmp_path: Path) -> None:
    """Guards PEFT's saving, which needs the whole tensor on one rank."""
    done = launch("fsdp", 2, "sft", "--recipe", recipe, "--peft_type", "prefix", "--output_dir", tmp_path / "run")
    assert done.code and "ddp.yaml" in done.err and "✘ recipe" in done.err, done


def test_begins_in_fp32_on_a_bf16_base(settings, tiny: Path) -> None:
    """Guards small updates, which bf16 would round away."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stepladder.model import build

    for kind in KINDS:
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
        recipe = settings(use_peft=True, peft_type=kind, num_virtual_tokens=4, virtual_tokens_text="Answer well.")
        model = build.attach_adapter(base, recipe, AutoTokenizer.from_pretrained(tiny))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
