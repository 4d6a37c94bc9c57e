"""Packing changes the speed, not what is learned: no conversation sees another's tokens."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_losses_and_gradients_are_the_unpacked_ones(attention, tiny) -> None:
    """Guards against contamination between packed rows, per token: trl#1230, transformers#31629.

    1e-5 is what fp32 sums in another order differ by at losses of about 10.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.manual_seed(1)
    rows = [torch.randint(10, 1000, (length,)).tolist() for length in (17, 5, 30, 9, 22, 3)]
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=attention).train()

    def token_losses(batch: dict) -> torch.Tensor:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1]
        per_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return per_token[labels[:, 1:].flatten() != -100]

    def gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        losses.sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

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
