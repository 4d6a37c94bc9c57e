"""A saved adapter is the one that was trained, or the run says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepladder.errors import ModelError
from stepladder.model import build, pretrained, weights
from stepladder.model.start import check_source

A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
EXPECTED = {A: (2, 8), B: (8, 2)}
GOOD = {A: torch.ones(2, 8), B: torch.ones(8, 2)}


def test_a_good_adapter_passes(tmp_path) -> None:
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    weights.check_saved_adapter(tmp_path, EXPECTED)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "0 tensors, expected 2"),
        ({A: GOOD[A]}, "1 tensors, expected 2"),
        ({A: GOOD[A], B: torch.ones(0, 2)}, "not the one that was trained"),
        ({A: GOOD[A], B: torch.full((8, 2), float("nan"))}, "not finite"),
        ({A: GOOD[A], B: torch.zeros(8, 2)}, "nothing was learned"),
    ],
    ids=["empty", "half", "a shard", "NaN", "untrained"],
)
def test_a_wrong_adapter_is_refused(tensors, said, tmp_path) -> None:
    """Guards against the empty adapters that sharded strategies have saved without a word (trl#4416)."""
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=said):
        weights.check_saved_adapter(tmp_path, EXPECTED)


def test_no_file_at_all(tmp_path) -> None:
    with pytest.raises(ModelError, match="no adapter was saved"):
        weights.check_saved_adapter(tmp_path, EXPECTED)


def test_weights_of_another_user_that_may_not_be_read_are_named(tiny: Path, monkeypatch) -> None:
    """Guards the message: safetensors says of such a file that it does not exist."""
    monkeypatch.setattr(os, "access", lambda file, mode: False)  # the tests may run as root, who reads all
    with pytest.raises(ModelError, match=r"model\.safetensors may not be read by you"):
        check_source(str(tiny))


@pytest.mark.parametrize(
    ("modules", "adapted"),
    [
        ([r".*\.(q|v)_proj"], 6),  # two in each of three layers
        ([r"model\.layers\.[01]\.self_attn\..*_proj"], 8),  # four in each of two layers
        (["q_proj"], 3),
        (["self_attn.q_proj"], 3),
        (["q_proj", "v_proj"], 6),
        (["All-Linear"], 21),  # seven in each layer
    ],
)
def test_target_modules_are_those_that_are_named(modules: list[str], adapted: int, tiny: Path, settings) -> None:
    """Guards a regular expression, a single name and a list against each other's meaning."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = build.attach_adapter(base, settings(use_peft=True, lora_target_modules=modules))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == adapted


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"lora_target_modules": [r"model.language_model.layers.[\d]+.(q|v)_proj"]},
            [r"'model.language_model.layers.[\d]+.(q|v)_proj'", "such as model.layers.0.", "all-linear"],
        ),
        ({"lora_target_modules": [".*"]}, ["'.*' is a regular expression"]),
        ({"lora_target_modules": ["q_proj", "k_prj"]}, ["lora_target_modules: the model has no k_prj", "'k_proj'"]),
        ({"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_hed"]}, ["no lm_hed", "'lm_head'"]),
        ({"lora_target_modules": ["q_proj"], "lora_target_parameters": ["experts.w1"]}, ["no experts.w1"]),
    ],
    ids=str,
)
def test_a_name_that_matches_nothing_is_named(keys: dict, parts: list[str], tiny: Path, settings) -> None:
    """Guards against a smaller adapter than the recipe says: PEFT is content where one name of a list matches."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(ModelError) as caught:
        build.attach_adapter(AutoModelForCausalLM.from_pretrained(tiny), settings(use_peft=True, **keys))
    assert all(part in caught.value.render() for part in parts), caught.value


@pytest.mark.parametrize(
    ("kind", "dtype", "low"),
    [
        ("lora", torch.float32, torch.bfloat16),
        ("prefix", torch.float32, torch.bfloat16),
        ("lora", torch.bfloat16, torch.float16),  # on a T4, which would cast each weight at each use
    ],
)
def test_weights_held_as_they_are_computed_with_change_nothing(kind, dtype, low, tiny: Path, settings) -> None:
    """Guards the promise of `hold_as_computed`: loss and gradients are the same to the bit, in half the memory."""
    from transformers import AutoModelForCausalLM

    def step(held: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        keys = {"lora_r": 4, "lora_target_modules": ["all-linear"]} if kind == "lora" else {}
        model = build.attach_adapter(base, settings(use_peft=True, peft_type=kind, **keys))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if held:
            build.hold_as_computed(model, {torch.bfloat16: "bf16", torch.float16: "fp16"}[low])
        ids = torch.arange(24).reshape(2, 12)
        with torch.autocast("cpu", low):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        frozen = [m for m in model.modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad]
        frozen = [m.weight for m in frozen if m is not model.get_output_embeddings()]
        assert not held or {weight.dtype for weight in frozen} == {low}
        linear = sum(weight.nbytes for weight in frozen)
        return loss.detach(), gradients, linear

    (loss, gradients, size), (same, others, half) = step(held=False), step(held=True)
    assert torch.equal(loss, same) and all(map(torch.equal, gradients, others))
    assert half == size * low.itemsize / dtype.itemsize


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_layers_compute_what_pefts_compute(precision: str, tiny: Path, settings) -> None:
    """Guards `FusedLinear`: loss and gradients are PEFT's, and in bf16 no further from fp32's than PEFT's are.

    1e-5 is what fp32 sums in another order differ by.
    """
    from transformers import AutoModelForCausalLM

    def gradients(fused: bool, low: bool) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        keys = {"lora_r": 4, "lora_target_modules": ["all-linear"]}
        model = build.attach_adapter(base, settings(use_peft=True, **keys), fused=fused)
        assert fused == any(type(module).__name__ == "FusedLinear" for module in model.modules())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if low:
            build.hold_as_computed(model, "bf16")
        ids = torch.arange(24).reshape(2, 12)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def distance(gradient: torch.Tensor) -> float:
        return ((gradient - exact).norm() / exact.norm()).item()

    exact_loss, exact = gradients(fused=False, low=False)
    loss, gradient = gradients(fused=True, low=precision == "bf16")
    if precision == "fp32":
        assert abs(loss - exact_loss) < 1e-5 and distance(gradient) < 1e-5
    else:
        _, theirs = gradients(fused=False, low=True)
        assert distance(gradient) < 1.1 * distance(theirs)


@pytest.mark.parametrize("keys", [{"lora_dropout": 0.5}, {"use_dora": True}, {"load_in_4bit": True}], ids=str)
def test_what_is_not_fused_is_left_to_peft(keys: dict, tiny: Path, settings) -> None:
    """Guards dropout, DoRA and quantized layers, which the fused formula does not have: the same loss."""
    from transformers import AutoModelForCausalLM

    def loss(fused: bool) -> float:
        recipe = settings(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], **keys)
        base = AutoModelForCausalLM.from_pretrained(
            tiny, dtype=torch.float32, quantization_config=pretrained.quantization_config(recipe, "fp32")
        )
        torch.manual_seed(0)
        model = build.attach_adapter(base, recipe, fused=fused).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        ids = torch.arange(24).reshape(2, 12)
        return model(input_ids=ids, labels=ids).loss.item()

    assert loss(fused=True) == loss(fused=False)
