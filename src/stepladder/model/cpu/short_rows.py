"""Attention row by row on a CPU: short rows in bf16 by plain matrix products, all others in fp32.

On a Zen 4 PyTorch's kernel takes twice as long for its backward pass in bf16 as in fp32, and on rows of a few hundred
tokens most of its time goes elsewhere than into the products (`benchmarks/attention.py`). Here the products are in
bf16, and the scores in fp32 as the kernel has them: rounded to bf16, a large score would change its probability by
percents. All probabilities are held for the backward pass, so rows must be short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from stepladder.model import attention

BY_ROW_ON_CPU = f"{attention.BY_ROW}_on_cpu"
SHORT = 256  # tokens: eight rows of SmolLM2's nine heads then hold 9 MB a layer at most


class ShortRows(torch.autograd.Function):
    """Causal attention of rows that lie end to end, each by itself; a key's head may serve several of the query's.

    Takes query [1, heads, tokens, size], key and value [1, their heads, tokens, size], and the rows' lengths, which sum
    up to the tokens; gives [1, tokens, heads, the value's size]. Not under autocast, which would round the scores.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float
    ) -> torch.Tensor:
        heads, keys, longest = query.shape[1], key.shape[1], max(lengths)
        future = torch.full((longest, longest), -torch.inf).triu_(1).repeat(heads // keys, 1, 1)
        scaled, at_key = query[0].float() * scaling, key[0].float()
        out = value.new_empty(1, query.shape[2], heads, value.shape[3])
        probabilities, at = [], 0
        for length in lengths:
            row = slice(at, at + length)
            mask = future[:, :length, :length].reshape(-1, length).expand(keys, -1, -1)
            scores = torch.baddbmm(mask, _by_key(scaled[:, row], keys), at_key[:, row].transpose(1, 2))
            p = scores.softmax(-1).to(value.dtype)
            out[0, row] = (p @ value[0, :, row]).view(heads, length, -1).transpose(0, 1)
            probabilities.append(p)
            at += length
        ctx.save_for_backward(scaled.to(value.dtype), (at_key * scaling).to(value.dtype), value, *probabilities)
        ctx.lengths, ctx.dtypes = lengths, (query.dtype, key.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, *probabilities = ctx.saved_tensors  # query and key scaled, in the dtype of the products
        heads, keys = len(query), len(key)
        # laid out by token, as the projections before them want it
        to_query, to_key, to_value = (
            value.new_empty(1, value.shape[2], states.shape[-3], states.shape[-1], dtype=dtype).transpose(1, 2)
            for states, dtype in ((query, ctx.dtypes[0]), (key, ctx.dtypes[1]), (value, value.dtype))
        )
        at = 0
        for length, p in zip(ctx.lengths, probabilities, strict=True):
            row = slice(at, at + length)
            of_row = _by_key(gradient[0, row].transpose(0, 1), keys)
            to_value[0, :, row] = p.transpose(1, 2) @ of_row
            to_p = of_row @ value[0, :, row].transpose(1, 2)
            to_scores = torch._softmax_backward_data(to_p, p, -1, p.dtype)
            to_query[0, :, row] = (to_scores @ key[:, row]).view(heads, length, -1)
            to_key[0, :, row] = to_scores.transpose(1, 2) @ _by_key(query[:, row], keys)
            at += length
        return to_query, to_key, to_value, None, None


def _by_key(states: torch.Tensor, keys: int) -> torch.Tensor:
    """[heads, tokens, size] to [keys, heads that share one × tokens, size]."""
    return states.reshape(keys, -1, states.shape[-1])


def _rows_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    dropout: float,
    scaling: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `attention.causal_rows`, but in the fastest dtype of a CPU."""
    if value.dtype == torch.bfloat16 and len(value) == 1 and max(lengths) <= SHORT and not dropout:
        out: torch.Tensor = ShortRows.apply(query, key, value, lengths, scaling or query.shape[-1] ** -0.5)
        return out
    return attention.causal_rows(query, key, value, lengths, dropout, scaling, torch.float32)


attention.register(BY_ROW_ON_CPU, _rows_on_cpu)
