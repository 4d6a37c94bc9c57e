"""LoRA's linear layer in one autograd function: what PEFT computes, in fewer passes over memory.

PEFT adds `lora_B(lora_A(x)) * scaling` to the layer's output in operators of their own: two casts of the input, a
product with the scaling and a sum, forward and backward again. In a small model these move more memory than the
matrix products. Here the low-rank part is added by the matrix product itself (`addmm`), the input is cast once for
all layers that read it, and of the input one copy is kept for the backward pass. The formula is that of Hu et al.
2021 (arXiv 2106.09685); deriving its gradients by hand is known from Unsloth.

PEFT's seam for it is `LoraConfig._register_custom_module` (PEFT's guide "Custom models").
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable


class FusedLinear(Linear):
    """A `torch.nn.Linear` with one adapter; whatever else PEFT's layer can do, it does as PEFT does."""

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
