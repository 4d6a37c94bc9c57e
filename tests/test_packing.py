"""Packing changes the speed, not what is learned: no conversation sees another's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.model import attention, cpu_kernels
from stepladder.model.cpu_kernels import ShortRows, speed_up
from stepladder.recipe.recipe import Recipe

SMALL = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 2}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": SMALL,
    "qwen3_moe": {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
    # windows that no row reaches, and that most do
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 32},
    "phi3": {**SMALL, "sliding_window": 8},
}  # fmt: skip


def model_of(architecture: str, implementation: str = "sdpa", **changes: Any) -> Any:
    """A small model with random weights, the same at each call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES.get(architecture, SMALL), **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


def recipe_of(**values: Any) -> Recipe:
    return Recipe(name="", path=Path(), values=values, origins={})


def two_rows() -> dict[str, torch.Tensor]:
    """A padded batch, of which the second half of each row is trained."""
    torch.manual_seed(1)
    ids = torch.randint(10, 1000, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.arange(20) < 10), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients_of(model: Any) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "by row", "by row as on a GPU"])
def test_packed_losses_and_gradients_are_the_unpacked_ones(implementation, architecture) -> None:
    """Guards against contamination between packed rows, per token: trl#1230, transformers#31629.

    1e-5 is what fp32 sums in another order differ by at losses of about 10.
    """
    from datasets import Dataset
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.manual_seed(1)
    rows = [torch.randint(10, 1000, (length,)).tolist() for length in (17, 5, 30, 9, 22, 3)]
    by_row = implementation.startswith("by row")
    model = model_of(architecture, "sdpa" if by_row else implementation)
    assert not by_row or attention.by_row(model, recipe_of())
    if implementation == "by row":
        speed_up(model, -100)

    def token_losses(batch: dict) -> torch.Tensor:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1]
        per_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return per_token[labels[:, 1:].flatten() != -100]

    def gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        losses.sum().backward()
        return gradients_of(model)

    packed_rows = pack_dataset(Dataset.from_dict({"input_ids": rows, "labels": rows}), 48, "bfd", {})
    assert len(packed_rows) < len(rows)
    collate = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)
    packed = token_losses(collate(list(packed_rows)))

    order = [row for packed_row in packed_rows for row in _split(packed_row)]
    single = torch.cat([token_losses(_alone(row)) for row in order])
    assert torch.allclose(packed, single, atol=1e-5, rtol=0), (packed - single).abs().max()
    for a, b in zip(gradients(packed), gradients(single), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def _split(packed: dict) -> list[list[int]]:
    ids, rows = packed["input_ids"], []
    for length in packed["seq_lengths"]:
        rows.append(ids[:length])
        ids = ids[length:]
    return rows


def _alone(ids: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_by_row_leaves_padded_batches_and_generation_alone(architecture) -> None:
    """Guards evaluation and the samples of a run, which use the model that trains: with a cache, with padding."""
    plain, model = model_of(architecture).eval(), model_of(architecture).eval()
    assert attention.by_row(model, recipe_of())
    speed_up(model, -100)
    batch = two_rows()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[real], plain(**batch).logits[real])
    left = {key: value.flip(1) for key, value in batch.items() if key != "labels"}
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**left, **asked), plain.generate(**left, **asked))


def test_by_row_in_bf16_is_nearer_to_fp32_than_sdpa() -> None:
    """Guards the fp32 of it: under autocast SDPA would round queries, keys and values to bf16."""
    ids = torch.arange(10, 50)[None]
    exact = model_of("llama")(input_ids=ids).logits

    def error(model: Any) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float((model(input_ids=ids).logits - exact).abs().mean())

    model = model_of("llama")
    plain = error(model)
    assert attention.by_row(model, recipe_of())
    speed_up(model, -100)
    assert error(model) < plain


@pytest.mark.parametrize(
    ("architecture", "implementation", "changes", "keys"),
    [
        ("llama", "eager", {}, {}),
        ("llama", "sdpa", {}, {"padding_free": False}),
        ("llama", "sdpa", {}, {"use_peft": True, "peft_type": "prefix"}),
        ("opt", "sdpa", {"ffn_dim": 64, "word_embed_proj_dim": 32}, {}),
        ("qwen3", "sdpa", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, {}),
    ],
)
def test_what_is_not_computed_by_row(architecture, implementation, changes, keys) -> None:
    """Guards against rows laid end to end where nothing keeps them apart, or a window would be lost."""
    assert not attention.by_row(model_of(architecture, implementation, **changes), recipe_of(**keys))


LENGTHS = [17, 1, 30, 9]


def attended(of: Any, dtype: torch.dtype, value: int = 16) -> list[torch.Tensor]:
    """Output and gradients of `of(query, key, value)`; large scores, of which some decide, and two heads a key."""
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), size) for heads, size in ((4, 16), (2, 16), (2, value))]
    states = [(tensor * 3).to(dtype).requires_grad_() for tensor in states]
    out = of(*states)
    out.float().mul(torch.randn(out.shape)).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in states)]


def by_sdpa(*states: torch.Tensor) -> torch.Tensor:
    rows = zip(*(tensor.split(LENGTHS, dim=2) for tensor in states), strict=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([sdpa(*row, is_causal=True, enable_gqa=True).transpose(1, 2) for row in rows], dim=1)


def by_products(*states: torch.Tensor) -> torch.Tensor:
    return ShortRows.apply(*states, LENGTHS, 16**-0.5)


def test_short_rows_are_attended_as_by_sdpa() -> None:
    """Guards the gradients that are derived by hand, of values of a size of their own too, as DeepSeek has them.

    1e-5: sums of fp32 in another order.
    """
    for size in (16, 8):
        both = (attended(way, torch.float32, size) for way in (by_products, by_sdpa))
        assert all(torch.allclose(own, theirs, atol=1e-5, rtol=1e-5) for own, theirs in zip(*both, strict=True))


def test_short_rows_in_bf16_are_as_near_to_fp32_as_sdpa() -> None:
    """Guards the scores, which are in fp32: rounded to bf16 they would make the error 1.35 of SDPA's here."""
    exact, own, theirs = (attended(*way) for way in ((by_sdpa, torch.float32), (by_products, torch.bfloat16),
                                                     (by_sdpa, torch.bfloat16)))  # fmt: skip

    def error(found: list[torch.Tensor]) -> float:
        return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    assert error(own) < 1.2 * error(theirs)


def test_short_rows_are_a_models(monkeypatch) -> None:
    """Guards the way to them: rows in bf16 up to their bound, and none beyond it, which would hold all pairs."""
    lengths: list[list[int]] = []

    class Watched(ShortRows):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, rows: list[int], scaling: float) -> Any:
            lengths.append(rows)
            return ShortRows.forward(ctx, query, key, value, rows, scaling)

    monkeypatch.setattr(cpu_kernels, "ShortRows", Watched)
    monkeypatch.setattr(cpu_kernels, "SHORT", 20)
    model = model_of("llama")
    assert attention.by_row(model, recipe_of())
    speed_up(model, -100)

    def forward(rows: list[int], bf16: bool) -> None:
        lengths.clear()
        positions = torch.cat([torch.arange(row) for row in rows])[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(input_ids=positions + 10, position_ids=positions, use_cache=False)

    for rows, bf16, taken in (([20, 5], True, True), ([21, 5], True, False), ([20, 5], False, False)):
        forward(rows, bf16)
        assert lengths == ([rows] * 2 if taken else [])
