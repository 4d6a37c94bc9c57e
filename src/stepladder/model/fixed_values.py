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


def share(model: Any, from_first: Callable[[Any], Any]) -> None:
    """Give ranks whose model is on the meta device the values that rank 0 has; every rank calls it."""
    here = _buffers(model)
    if not here:
        return
    values = {name: buffer if buffer.is_meta else buffer.cpu() for name, buffer in here.items()}
    for name, buffer in from_first(values).items():
        if here[name].is_meta:
            _put(model, name, buffer)


def hold_in(model: Any, dtype: torch.dtype | None = None) -> None:
    """Hold VeRA's projections in the dtype of its trained vectors as they are used, once a strategy has the model.

    FSDP casts parameters at their use, and no buffers. ZeRO-2 holds an adapter in the precision of the run, ZeRO-3
    in fp32 beside a base that it has sharded while it was loaded.

    Args:
        dtype: what FSDP casts to; None for the dtype in which the vectors are held.
    """
    for name, buffer in projections(model).items():
        held = next(p.dtype for at, p in model.named_parameters() if ".vera_lambda_" in at)
        _put(model, name, buffer.to(dtype or held))


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
