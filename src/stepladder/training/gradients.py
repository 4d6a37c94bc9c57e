"""Gradients as every strategy needs them for the same curve: summed in fp32, with an exact norm, clipped by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

NORM_CHUNK = 65_536  # gradient elements summed at once: small enough to be exact to 1e-7, large enough to be fast


def list_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def gradient_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all gradients together (a scalar in fp64), over the ranks where they are sharded.

    PyTorch's fp32 norm on CPU sums a whole tensor in a few running sums (pytorch#151761): of an embedding of
    28 million weights it is 1.7e-3 too small, and of its halves under FSDP less. Clipping would carry that into the
    curves.
    """
    squares, groups = torch.zeros((), dtype=torch.float64), set()
    for gradient in gradients:
        if isinstance(gradient, DTensor):  # HSDP's replicas hold the same shards
            placed = enumerate(gradient.placements)
            groups |= {gradient.device_mesh.get_group(at) for at, placement in placed if placement.is_shard()}
        parts = [torch.linalg.vector_norm(part) for part in _local_part(gradient).flatten().split(NORM_CHUNK)]
        squares += torch.stack(parts).double().square().sum()
    for group in groups:
        torch.distributed.all_reduce(squares, group=group)
    return squares.sqrt()


def clip_gradients(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients in place to a norm of at most `max_norm`; returns the norm before."""
    before = gradient_norm(gradients)
    scale = float(max_norm / (before + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
    if scale < 1.0:
        for gradient in gradients:
            _local_part(gradient).mul_(scale)
    return before


def _local_part(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def sum_in_fp32(accelerator: Any) -> None:
    """Let FSDP and ZeRO sum gradients in fp32, over ranks and micro-batches; call it before they wrap the model.

    For bf16 Accelerate sets all of FSDP's dtypes to bf16 (`FullyShardedDataParallelPlugin.set_mixed_precision`): sums
    of gradients are less precise than DDP's, and the model's loss is rounded to steps of 3e-2 above 4. Torchtitan
    reduces in fp32, too. DeepSpeed sums in the dtype of the model (`get_data_types` and `communication_data_type` in
    `runtime/engine.py`), unless its configuration says otherwise.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config.setdefault("communication_data_type", "fp32")
        plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
