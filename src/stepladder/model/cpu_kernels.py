"""What a model computes faster on a CPU than the libraries do: its loss, short rows of attention, and LoRA's layers.

A GPU runs the libraries' own kernels. What each is worth: `benchmarks/without.py`.
"""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import library
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from stepladder.model import attention

BY_ROW_ON_CPU = f"{attention.BY_ROW}_on_cpu"
SHORT = 256  # tokens of a row: eight rows of SmolLM2's nine heads then hold 9 MB per layer at most
TOKENS = 256  # per matrix product of the loss: more are no faster, and take more memory
CACHED = 16  # of them in fp32 at a time, within the processor's caches
# What some architectures do to their logits; TRL's own loss knows it.
CHANGED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def speed_up(model: Any, ignored: int) -> None:
    """Let a model, which has TRL's fused output layer, use the loss and the attention that are made for CPUs.

    Args:
        model: with an adapter or without; where it attends row by row (`attention.by_row`), it goes on to.
        ignored: the label of a token without loss.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.get_text_config()._attn_implementation == attention.BY_ROW:
        base.set_attn_implementation(BY_ROW_ON_CPU)
    attach_loss(base, ignored)


# ---- the loss ----


def has_plain_logits(model: Any) -> bool:
    """Whether a model's loss is that of its output layer's logits as they are."""
    config = model.config.get_text_config()
    changed = any(getattr(config, key, None) is not None for key in CHANGED)
    return not changed and not hasattr(config, "output_router_logits")  # experts add a loss of their own


def attach_loss(model: Any, ignored: int) -> None:
    """Let `model` compute its logits and loss for the loss tokens only, and each product once, where it fits.

    It replaces `forward(..., labels=..., fused_lm_head=True)`, which TRL's `add_fused_lm_head` adds. Without Triton,
    TRL computes the logits of every position (`compact` in trl/trainer/utils.py), and again in fp32 for the gradient
    (`ChunkedLogProbFunction`). Here the gradient is computed with the logits, a few tokens at a time, as in Liger's
    fused loss (Hsu et al. 2024, arXiv 2410.10989), but per token: what the loss does with it comes later.

    Args:
        ignored: the label of a token without loss.
    """
    if not has_plain_logits(model):
        return
    forward = model.forward

    @functools.wraps(forward)
    def forward_with_loss(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        mask = torch.nn.functional.pad(labels[:, 1:] != ignored, (0, 1))
        positions = mask.flatten().nonzero().flatten()
        targets = labels.flatten()[positions + 1]
        # a batch that trains nothing still takes part in the backward pass, for the ranks that wait for it
        results = log_probs(hidden.flatten(0, 1).index_select(0, positions), self.get_output_embeddings(), targets)
        of_labels = mask[:, :-1]
        of_token, entropy, top = (x.new_zeros(of_labels.shape).masked_scatter(of_labels, x) for x in results)
        loss = -of_token.sum() / (of_labels.sum().clamp(min=1) if items is None else items)
        return FusedCausalLMOutput(loss=loss, log_probs=of_token, entropy=entropy, is_top1=top, label_mask=of_labels)

    model.forward = types.MethodType(forward_with_loss, model)


@torch.compiler.disable
def log_probs(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each next token [tokens], by the hidden state [tokens, size] before it.

    Returns:
        Its log-probability; the entropy, and whether it is the likeliest token, without gradient.
    """
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # FSDP's shards
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):  # ZeRO-3's
        return _LogProbs.apply(hidden, weight, bias, targets)


class _LogProbs(torch.autograd.Function):
    """`log softmax(hidden weightᵀ + bias)` at the targets, with hidden [N, size] and weight [vocabulary, size].

    The gradient of a token's log-probability by its logits is `onehot - p`; by its hidden state, that times the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, low = hidden.to(dtype), weight.to(dtype)
        of_token, entropy = (hidden.new_empty(len(rows), dtype=torch.float32) for _ in range(2))
        top = torch.empty_like(targets, dtype=torch.bool)
        to_hidden = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        to_logits = rows.new_empty(len(rows), len(low)) if any(ctx.needs_input_grad[1:3]) else None
        exact = hidden.new_empty((2, min(CACHED, len(rows)), len(low)), dtype=torch.float32)
        for at in range(0, len(rows), TOKENS):
            part = slice(at, at + TOKENS)
            logits = rows[part] @ low.t()
            of_token[part], entropy[part], top[part] = _score(logits, bias, targets[part], exact)
            if to_hidden is not None:
                to_hidden[part] = logits @ low
            if to_logits is not None:
                to_logits[part] = logits
        ctx.mark_non_differentiable(entropy, top)
        ctx.save_for_backward(rows if to_logits is not None else None, to_hidden, to_logits)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return of_token, entropy, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        rows, to_hidden, to_logits = ctx.saved_tensors
        for_hidden, for_weight, for_bias, _ = ctx.needs_input_grad
        of_token = gradient[:, None]
        return (
            (to_hidden * of_token).to(ctx.dtypes[0]) if for_hidden else None,
            (to_logits.t() @ (rows * of_token).to(rows.dtype)).to(ctx.dtypes[1]) if for_weight else None,
            (to_logits * of_token).sum(0).to(ctx.dtypes[2]) if for_bias else None,
            None,
        )


@library.custom_op(
    "stepladder::score",
    mutates_args={"logits", "exact"},
    schema="(Tensor(a!) logits, Tensor? bias, Tensor targets, Tensor(b!) exact) -> (Tensor, Tensor, Tensor)",
)
def _score(logits: torch.Tensor, bias: Any, targets: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `log_probs` returns, from logits [tokens, vocabulary], which the log-probabilities' gradients overwrite.

    What is in fp32 lies in `exact` [2, CACHED, vocabulary]. An operator, so that the plan, which follows shapes only,
    passes through it once and not per block.
    """
    results = []
    for block, of_block in zip(logits.split(CACHED), targets.split(CACHED), strict=True):
        target = of_block[:, None]
        log_p, p = exact[:, : len(block)]
        log_p.copy_(block)
        if bias is not None:
            log_p.add_(bias)
        most, likeliest = log_p.max(-1, keepdim=True)
        torch.softmax(log_p, -1, out=p)
        log_p.sub_(most - p.gather(1, likeliest).log())  # the likeliest token's p: 1 / the sum of all of them
        results.append((log_p.gather(1, target)[:, 0], log_p.mul_(p).sum(-1).neg_(), (likeliest == target)[:, 0]))
        block.copy_(p.neg_()).scatter_add_(1, target, torch.ones_like(target, dtype=logits.dtype))
    return tuple(map(torch.cat, zip(*results, strict=True)))


@_score.register_fake
def _(logits: torch.Tensor, bias: Any, targets: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
    of_token, entropy = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    return of_token, entropy, torch.empty_like(targets, dtype=torch.bool)


# ---- attention ----


class ShortRows(torch.autograd.Function):
    """Causal attention of short rows that lie end to end, each by itself, in bf16 by plain matrix products.

    On a Zen 4 PyTorch's kernel takes twice as long for its backward pass in bf16 as in fp32, and on rows of a few
    hundred tokens most of its time goes elsewhere than into the products (`benchmarks/attention.py`). Here the products
    are in bf16, and the scores in fp32 as the kernel has them: rounded to bf16, a large score would change its
    probability by percents. All probabilities are held for the backward pass, so rows must be short.

    Takes query [1, heads, tokens, size], key and value [1, their heads, tokens, size], and the rows' lengths, which sum
    up to the tokens; gives [1, tokens, heads, the value's size]. A key's head may serve several of the query's. Not
    under autocast, which would round the scores.
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
    """As `attention.causal_rows`, but short rows in bf16 by `ShortRows`, and all others in fp32."""
    if value.dtype == torch.bfloat16 and len(value) == 1 and max(lengths) <= SHORT and not dropout:
        out: torch.Tensor = ShortRows.apply(query, key, value, lengths, scaling or query.shape[-1] ** -0.5)
        return out
    return attention.causal_rows(query, key, value, lengths, dropout, scaling, torch.float32)


attention.register(BY_ROW_ON_CPU, _rows_on_cpu)


# ---- LoRA ----


class FusedLinear(Linear):
    """LoRA's layer on a `torch.nn.Linear` in one autograd function: what PEFT computes, in fewer passes over memory.

    PEFT adds `lora_B(lora_A(x)) * scaling` to the layer's output in operators of their own: two casts of the input, a
    product with the scaling and a sum, forward and backward again. In a small model these move more memory than the
    matrix products. Here the low-rank part is added by the matrix product itself (`addmm`), the input is cast once for
    all layers that read it, and one copy of it is kept for the backward pass. The formula is that of Hu et al. 2021
    (arXiv 2106.09685); deriving its gradients by hand is known from Unsloth.

    PEFT's seam for it is `LoraConfig._register_custom_module` (PEFT's guide "Custom models"). What one adapter without
    dropout does not need, PEFT's own layer computes.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.merged or self.disable_adapters or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name] or self._drops(name):
            return super().forward(x)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        return _LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    def _drops(self, name: str) -> bool:
        return self.training and getattr(self.lora_dropout[name], "p", 0.0) > 0


class _LowRank(torch.autograd.Function):
    """`x Wᵀ + bias + scaling · x Aᵀ Bᵀ`, with x [..., in], W [out, in] frozen, A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        low, weight, a_low, b_low = _cast(x, dtype), weight.to(dtype), a.to(dtype), b.to(dtype)
        rows = low.reshape(-1, low.shape[-1])
        inner = rows @ a_low.t()
        out = rows @ weight.t() if bias is None else torch.addmm(bias.to(dtype), rows, weight.t())
        out.addmm_(inner, b_low.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a_low, b_low, inner)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weight, a, b, inner = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        through = (gradient @ b).mul_(ctx.scaling)  # [tokens, r]
        to_a = through.t() @ rows
        to_b = (gradient.t() @ inner).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(through, a).view(ctx.shape)
        return to_x, None, None, to_a.to(ctx.dtypes[0]), to_b.to(ctx.dtypes[1]), None


_last: tuple[Any, int, torch.Tensor] | None = None


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`: the copy of the layer before where that read the same tensor, as query, key and value do."""
    global _last
    if x.dtype == dtype:
        return x
    if _last and _last[0]() is x and _last[1] == x._version and _last[2].dtype == dtype:
        return _last[2]
    low = x.detach().to(dtype)
    _last = weakref.ref(x), x._version, low
    return low
