"""Gradients summed and measured exactly enough that clipping by their norm is the same on every strategy.

PyTorch's fp32 norm on CPU adds up a whole tensor in a few running sums (pytorch#151761): of an
embedding of 28 million weights it is 1.7e-3 too small, of its halves under FSDP less, and DeepSpeed,
which sums in fp64, has it right. Clipping would carry that into the curves. GPUs sum in a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

PART = 65_536  # elements summed at once: small enough to be exact to 1e-7, large enough to be fast


def of(model: torch.nn.Module) -> list[torch.Tensor]:
    """The gradients that the backward pass has left."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all gradients together (a scalar in fp64), over the ranks where they are sharded."""
    squares, sharded = torch.zeros((), dtype=torch.float64), False
    for gradient in gradients:
        sharded = sharded or isinstance(gradient, DTensor)
        parts = [torch.linalg.vector_norm(part) for part in local(gradient).flatten().split(PART)]
        squares += torch.stack(parts).double().square().sum()
    if sharded:
        torch.distributed.all_reduce(squares)
    return squares.sqrt()


def clip(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients in place so that their norm is at most `max_norm`; returns what it was."""
    before = norm(gradients)
    scale = float(max_norm / (before + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
    if scale < 1.0:
        for gradient in gradients:
            local(gradient).mul_(scale)
    return before


def reduce_in_fp32(accelerator: Any) -> None:
    """Let FSDP sum gradients over the ranks in fp32 and hand on the loss as it is; call it before it wraps the model.

    For bf16 Accelerate sets all of FSDP's dtypes to bf16 (`FullyShardedDataParallelPlugin.set_mixed_precision`):
    sums of gradients lose what DDP keeps, and the loss itself is rounded on its way out of the model, to
    steps of 3e-2 for a loss above 4. Torchtitan reduces in fp32, too.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def local(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient that FSDP has sharded."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
