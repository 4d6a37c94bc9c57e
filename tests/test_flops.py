"""The operations of training, held against those that PyTorch counts in a real step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from stepladder.model.flops import count_experts, count_flops
from stepladder.training.result import parameter_counts

ROWS, LENGTH = 2, 96
DENSE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip
EXPERTS: dict[str, Any] = {**DENSE, "num_experts_per_tok": 2, "experts_implementation": "eager"}
LATENT: dict[str, Any] = {
    **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24,
    "v_head_dim": 16,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "tie_word_embeddings": False},
    "qwen3": {**DENSE, "head_dim": 32, "tie_word_embeddings": True},  # 4 × 32 in a model that is 64 wide
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 32},
    "mixtral": {**EXPERTS, "num_local_experts": 8},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, "n_group": 2, "topk_group": 1},
}


def count_in_a_step(model: Any) -> tuple[int, int]:
    """What PyTorch counts in a forward pass, and in it and its backward pass."""
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 128
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SHAPES)
def test_operations_as_pytorch_counts_them(kind: str, full: bool) -> None:
    """Guards the formula: attention's width, the embedding that is looked up, idle experts, frozen weights."""
    config = AutoConfig.for_model(kind, **SHAPES[kind])
    model: Any = AutoModelForCausalLM.from_config(config)
    if not full:
        names = ["q_proj", "q_a_proj", "kv_a_proj_with_mqa", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
        model.enable_input_require_grads()  # else the first layer's input needs no gradient, which is not counted
    counts = parameter_counts(model)
    found = count_flops(config, counts["all"], counts["trainable"], full)
    forward, both = count_in_a_step(model)
    tokens, pairs = ROWS * LENGTH, ROWS * LENGTH**2  # eager attention computes the causal half and the other
    # Norms count as products, which in a model this small is 0.3 %.
    assert found.count_forward(tokens, pairs) == pytest.approx(forward, rel=0.004)
    assert found.count_training(tokens, pairs) == pytest.approx(both, rel=0.004)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_by_each_of_their_keys(key: str) -> None:
    """Guards a model of remote code, whose configuration has one of the names alone."""
    assert count_experts(SimpleNamespace(**{key: 12})) == 12
    assert count_experts(AutoConfig.for_model("llama")) == 0
