"""The output layer and its loss on a CPU: for the loss tokens only, and each product once.

Without Triton, TRL computes the logits of every position (`compact` in trl/trainer/utils.py), and once more in fp32 for
the gradient (`ChunkedLogProbFunction`). Here the gradient is computed with the logits, a few tokens at a time, as in
Liger's fused loss (Hsu et al. 2024, arXiv 2410.10989), but per token: what the loss does with it comes later.

It replaces `forward(..., labels=..., fused_lm_head=True)`, which TRL's `add_fused_lm_head` adds to a model.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import library
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

TOKENS = 256  # per matrix product: more are no faster, and take more memory
CACHED = 16  # of them in fp32 at a time, within the processor's caches
# What some architectures do to their logits; TRL's own loss knows it.
CHANGED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def fits(model: Any) -> bool:
    """Whether a model's loss is that of its output layer's logits as they are."""
    config = model.config.get_text_config()
    changed = any(getattr(config, key, None) is not None for key in CHANGED)
    return not changed and not hasattr(config, "output_router_logits")  # experts add a loss of their own


def attach(model: Any, ignored: int) -> None:
    """Let `model`, which has TRL's fused output layer, compute its loss by this one, where it fits.

    Args:
        ignored: the label of a token that is not trained.
    """
    if not fits(model):
        return
    forward = model.forward

    @functools.wraps(forward)
    def scored(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        mask = torch.nn.functional.pad(labels[:, 1:] != ignored, (0, 1))
        positions = mask.flatten().nonzero().flatten()
        targets = labels.flatten()[positions + 1]
        # a batch that trains nothing still takes part in the backward pass, for the ranks that wait for it
        found = log_probs(hidden.flatten(0, 1).index_select(0, positions), self.get_output_embeddings(), targets)
        of_labels = mask[:, :-1]
        one, entropy, top = (x.new_zeros(of_labels.shape).masked_scatter(of_labels, x) for x in found)
        loss = -one.sum() / (of_labels.sum().clamp(min=1) if items is None else items)
        return FusedCausalLMOutput(loss=loss, log_probs=one, entropy=entropy, is_top1=top, label_mask=of_labels)

    model.forward = types.MethodType(scored, model)


@torch.compiler.disable
def log_probs(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each next token [tokens], by the hidden state [tokens, size] before it.

    Returns:
        Its log-probability; the entropy, and whether it is the likeliest word, without gradient.
    """
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # FSDP's shards
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):  # ZeRO-3's
        return _LogProbs.apply(hidden, weight, bias, targets)


class _LogProbs(torch.autograd.Function):
    """`log softmax(hidden weightᵀ + bias)` at the targets, with hidden [N, size] and weight [words, size].

    The gradient of a token's log-probability by its scores is `onehot - p`; by its hidden state, that times the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, low = hidden.to(dtype), weight.to(dtype)
        found, entropy = (hidden.new_empty(len(rows), dtype=torch.float32) for _ in range(2))
        top = torch.empty_like(targets, dtype=torch.bool)
        to_hidden = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        to_scores = rows.new_empty(len(rows), len(low)) if any(ctx.needs_input_grad[1:3]) else None
        exact = hidden.new_empty((2, min(CACHED, len(rows)), len(low)), dtype=torch.float32)
        for at in range(0, len(rows), TOKENS):
            part = slice(at, at + TOKENS)
            scores = rows[part] @ low.t()
            found[part], entropy[part], top[part] = _judged(scores, bias, targets[part], exact)
            if to_hidden is not None:
                to_hidden[part] = scores @ low
            if to_scores is not None:
                to_scores[part] = scores
        ctx.mark_non_differentiable(entropy, top)
        ctx.save_for_backward(rows if to_scores is not None else None, to_hidden, to_scores)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return found, entropy, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        rows, to_hidden, to_scores = ctx.saved_tensors
        for_hidden, for_weight, for_bias, _ = ctx.needs_input_grad
        of_token = gradient[:, None]
        return (
            (to_hidden * of_token).to(ctx.dtypes[0]) if for_hidden else None,
            (to_scores.t() @ (rows * of_token).to(rows.dtype)).to(ctx.dtypes[1]) if for_weight else None,
            (to_scores * of_token).sum(0).to(ctx.dtypes[2]) if for_bias else None,
            None,
        )


@library.custom_op(
    "stepladder::judged",
    mutates_args={"scores", "exact"},
    schema="(Tensor(a!) scores, Tensor? bias, Tensor targets, Tensor(b!) exact) -> (Tensor, Tensor, Tensor)",
)
def _judged(scores: torch.Tensor, bias: Any, targets: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `log_probs` gives, of scores [tokens, words]; in their place lie the log-probabilities' gradients then.

    What is in fp32 lies in `exact` [2, CACHED, words]. An operator, so that the plan, which follows shapes only, passes
    through it once and not per block.
    """
    given = []
    for block, of_block in zip(scores.split(CACHED), targets.split(CACHED), strict=True):
        target = of_block[:, None]
        log_p, p = exact[:, : len(block)]
        log_p.copy_(block)
        if bias is not None:
            log_p.add_(bias)
        most, word = log_p.max(-1, keepdim=True)
        torch.softmax(log_p, -1, out=p)
        log_p.sub_(most - p.gather(1, word).log())  # the likeliest word's: 1 / the sum of all of them
        given.append((log_p.gather(1, target)[:, 0], log_p.mul_(p).sum(-1).neg_(), (word == target)[:, 0]))
        block.copy_(p.neg_()).scatter_add_(1, target, torch.ones_like(target, dtype=scores.dtype))
    return tuple(map(torch.cat, zip(*given, strict=True)))


@_judged.register_fake
def _(scores: torch.Tensor, bias: Any, targets: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found, entropy = (scores.new_empty(len(scores), dtype=torch.float32) for _ in range(2))
    return found, entropy, torch.empty_like(targets, dtype=torch.bool)
