"""Attention for rows that lie end to end: each row by itself.

Transformers' SDPA takes rows in one sequence with a mask of all pairs of tokens, most of which are computed to be
thrown away. Here the mask is the rows' lengths, and each row is a causal product of its own: exact, and with neither
padding nor a mask of pairs. On a GPU a row stays in bf16 or fp16, for which SDPA has a flash kernel. On a CPU it is
computed in fp32, since on a Zen 4 PyTorch's kernel takes twice as long for its backward pass in bf16; short rows in
bf16 are products of their own (`benchmarks/attention.py`).

Transformers' seam for it are the two registries of its guide "Attention backends".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stepladder.errors import ModelError
from stepladder.model.short_rows import SHORT, ShortRows
from stepladder.settings import Settings

BY_ROW, BY_ROW_ON_CPU = "sdpa_by_row", "sdpa_by_row_on_cpu"
GROUPED = 256  # numbers of a head, up to which SDPA's flash kernel lets a key's head serve several of the query's

# What Transformers compute of rows that lie end to end, architecture by architecture, is what tests/test_packing.py
# finds. A mask keeps them apart where it is made by positions; these make theirs without:
BLIND = {"afmoe", "bert-generation", "gpt_oss", "opt"}
# and these are of older code, and make it by positions all the same.
OLDER = {"codegen", "gpt_neox_japanese", "gptj", "stablelm"}
BY_LENGTH = {"full_attention", "sliding_attention"}  # layers in which FlashAttention keeps rows apart
BY_MASK = BY_LENGTH | {"chunked_attention", "indexed_attention"}


def by_row(model: PreTrainedModel, settings: Settings, on_cpu: bool = True) -> bool:
    """Let `model` attend row by row, and say whether it does, so that the rows of a batch may lie end to end.

    That takes layers of plain causal SDPA, and rows with nothing before them, as virtual tokens are.
    """
    if settings.get("use_peft") and settings.get("peft_type") != "lora":
        return False
    if settings.get("padding_free") is False and not settings.get("packing"):
        return False
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    if not kept_apart(model, {"full_attention"}) or config.model_type in BLIND:
        return False
    model.set_attn_implementation(BY_ROW_ON_CPU if on_cpu else BY_ROW)
    return True


def kept_apart(model: PreTrainedModel, layers: set[str]) -> bool:
    """Whether rows that lie end to end do not see each other, if layers of these kinds keep them apart.

    Not where a layer hands a state on from token to token (Mamba, short convolutions), positions are counted from the
    padding (BERT's family), or a bias grows with the distance (ALiBi, in older code).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    newer = model._supports_attention_backend or config.model_type in OLDER
    return newer and kinds <= layers and not model._is_stateful and not hasattr(config, "type_vocab_size")


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
    lengths = None if use_vmap or not end_to_end else _lengths(mask_function, q_length, device)
    if lengths is None or (local_size is not None and int(lengths.max()) > local_size):  # a window that cuts a row
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    return lengths_as_mask(lengths)


def _lengths(mask_function: Callable[..., torch.Tensor], tokens: int, device: torch.device | str) -> torch.Tensor:
    """Tokens of each row, on the host: a GPU is waited for once here, and not once more in each layer that asks."""
    at, first = torch.arange(1, tokens, device=device), torch.zeros(1, dtype=torch.long, device=device)
    # A row begins where a token does not see the one before it.
    begins = (~mask_function(first, first, at, at - 1)).cpu().nonzero().flatten() + 1
    return torch.cat([begins.new_zeros(1), begins, begins.new_tensor([tokens])]).diff()


@torch.compiler.disable
def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    on_cpu: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Query [rows, heads, tokens, size] to output [rows, tokens, heads, size]; other than causal rows as SDPA does."""
    masked = attention_mask is not None and attention_mask.dtype != torch.long
    causal = query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    biased = any(kwargs.get(key) is not None for key in ("position_bias", "softcap"))
    if masked or biased or not causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    tokens, longest = query.shape[2], kwargs.get("max_length_q")  # the collator's, where the model hands it on
    if attention_mask is None and longest is not None and longest < tokens:
        kind = getattr(module.config, "model_type", "this model")
        raise ModelError(
            f"the rows of a batch lie end to end, and {kind} does not keep them apart",
            why="it makes its attention mask without their positions: each row would see those before it",
            way_out="padding_free: false, and no packing",
        )
    [[[lengths]]] = [[[[tokens]]]] if attention_mask is None else attention_mask.tolist()
    device = query.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    with torch.autocast(device, enabled=False):
        if on_cpu and value.dtype == torch.bfloat16 and len(value) == 1 and max(lengths) <= SHORT and not dropout:
            return ShortRows.apply(query, key, value, lengths, scaling or query.shape[-1] ** -0.5), None
        states = [tensor.to(torch.float32 if on_cpu else low) for tensor in (query, key, value)]
        rows = zip(*(tensor.split(lengths, dim=2) for tensor in states), strict=True)
        out = torch.cat([_causal(q, k, v, dropout, scaling) for q, k, v in rows], dim=1)
    return out.to(value.dtype), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and not key.shape[-1] == value.shape[-1] <= GROUPED:  # else no kernel but the one that holds all scores
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


for _name, _on_cpu in ((BY_ROW, False), (BY_ROW_ON_CPU, True)):
    AttentionInterface.register(_name, functools.partial(_attention, on_cpu=_on_cpu))
    AttentionMaskInterface.register(_name, _mask)
