"""Values of an adapter that are not trained: VeRA's random projections, and OFT's indices into its blocks.

PEFT holds them as buffers. Rank 0 sends no buffers where it sends the weights of the base, and PEFT puts those of an
adapter on the meta device where its base is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PARTS = ("vera_A", "vera_B", "oft_R")


def projections(model: Any) -> dict[str, torch.Tensor]:
    """VeRA's projections by their names in the model; empty for any other adapter."""
    return {name: buffer for name, buffer in _buffers(model).items() if ".oft_R." not in name}


def prepare(model: Any, from_first: Callable[[Any], Any], dtype: torch.dtype) -> None:
    """Give ranks whose model is on the meta device the values that rank 0 has; every rank calls it.

    Args:
        dtype: that the strategy itself computes in; fp32 where autocast casts (one process, DDP).
    """
    here = _buffers(model)
    if not here:
        return
    values = {name: buffer if buffer.is_meta else buffer.cpu() for name, buffer in here.items()}
    for name, buffer in from_first(values).items():
        if here[name].is_meta:
            _put(model, name, buffer)
    hold_in(model, dtype)


def hold_in(model: Any, dtype: torch.dtype) -> None:
    """Hold VeRA's projections in the dtype of the products: FSDP and ZeRO cast parameters to it, and no buffers."""
    for name, buffer in projections(model).items():
        _put(model, name, buffer.to(dtype))


def _put(model: Any, name: str, buffer: torch.Tensor) -> None:
    place, _, part = name.rpartition(".")
    model.get_submodule(place)._buffers[part] = buffer


def restore_indices(model: Any, device: str) -> None:
    """Compute OFT's indices where PEFT made them on the meta device; no file has them."""
    import torch

    for module in model.modules():
        if {"rows", "cols"} <= module._buffers.keys() and module.rows.is_meta:
            module.rows, module.cols = torch.triu_indices(module.block_size, module.block_size, 1, device=device)


def _buffers(model: Any) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if {*name.split(".")} & {*PARTS}}
