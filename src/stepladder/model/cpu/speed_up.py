"""What a model computes faster on a CPU than the libraries do; a GPU runs the libraries' own kernels."""

from __future__ import annotations

from typing import Any

from stepladder.model import attention
from stepladder.model.cpu import fused_loss, short_rows


def speed_up(model: Any, ignored: int) -> None:
    """Let a model, which has TRL's fused output layer, use the loss and the attention that are made for CPUs.

    Args:
        model: with an adapter or without; where it attends row by row (`attention.by_row`), it goes on to.
        ignored: the label of a token that is not trained.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.get_text_config()._attn_implementation == attention.BY_ROW:
        base.set_attn_implementation(short_rows.BY_ROW_ON_CPU)
    fused_loss.attach(base, ignored)
