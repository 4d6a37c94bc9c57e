"""Attention on a CPU for rows that lie end to end: each row by itself, in fp32.

Transformers' SDPA takes rows in one sequence with a mask of all pairs of tokens, most of which are computed to be
thrown away. Here the mask is the rows' lengths, and each row is a causal product of its own: exact, and with neither
padding nor a mask of pairs. PyTorch's CPU kernel computes it in fp32, since on a Zen 4 its backward pass takes twice
as long in bf16; short rows in bf16 are products of their own (`benchmarks/attention.py`; issue 13).

Transformers' seam for it are the two registries of its guide "Attention backends".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stepladder.model.short_rows import SHORT, ShortRows
from stepladder.settings import Settings

NAME = "sdpa_by_row"


def by_row(model: PreTrainedModel, settings: Settings) -> bool:
    """Let `model` attend row by row, and say whether it does, so that the rows of a batch may lie end to end.

    That takes layers of plain causal SDPA, and rows with nothing before them, as virtual tokens are.
    """
    if settings.get("use_peft") and settings.get("peft_type") != "lora":
        return False
    if settings.get("padding_free") is False and not settings.get("packing"):
        return False
    config = model.config.get_text_config()
    plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config._attn_implementation != "sdpa" or not plain or not model._supports_attention_backend:
        return False
    model.set_attn_implementation(NAME)
    return True


def lengths_as_mask(lengths: torch.Tensor) -> torch.Tensor:
    """Tokens of each row [rows] as what stands for a mask, which models hand on as it is: [1, 1, 1, rows], int64."""
    return lengths[None, None, None]


@torch.compiler.disable  # what it gives has the shape of the rows, each batch another
def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The lengths of the rows in one sequence; for any other batch, the mask that SDPA takes."""
    end_to_end = batch_size == 1 and q_length == kv_length and attention_mask is None and not allow_is_causal_skip
    if not end_to_end or local_size is not None or use_vmap:
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    at, first = torch.arange(1, q_length, device=device), torch.zeros(1, dtype=torch.long, device=device)
    # A row begins where a token does not see the one before it.
    begins = (~mask_function(first, first, at, at - 1)).nonzero().flatten() + 1
    return lengths_as_mask(torch.cat([first, begins, first + q_length]).diff())


@torch.compiler.disable
def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Query [rows, heads, tokens, size] to output [rows, tokens, heads, size]; other than causal rows as SDPA does."""
    masked = attention_mask is not None and attention_mask.dtype != torch.long
    causal = query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    biased = any(kwargs.get(key) is not None for key in ("position_bias", "softcap"))
    if masked or biased or not causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    [[[lengths]]] = [[[[query.shape[2]]]]] if attention_mask is None else attention_mask.tolist()
    with torch.autocast(query.device.type, enabled=False):
        if len(value) == 1 and value.dtype == torch.bfloat16 and max(lengths) <= SHORT and not dropout:
            return ShortRows.apply(query, key, value, lengths, scaling or query.shape[-1] ** -0.5), None
        rows = zip(*(states.float().split(lengths, dim=2) for states in (query, key, value)), strict=True)
        out = torch.cat([_causal(q, k, v, dropout, scaling) for q, k, v in rows], dim=1)
    return out.to(value.dtype), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
