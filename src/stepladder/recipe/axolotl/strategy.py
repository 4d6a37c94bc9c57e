"""Axolotl's ways to shard a model, which here are the launch command's business: they give the same curve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stepladder import files
from stepladder.errors import RecipeError
from stepladder.recipe.axolotl.config import Config
from stepladder.recipe.axolotl.outcome import TRANSLATED, Outcome, left_out, unsupported


def deepspeed(value: Any, config: Config) -> Outcome:
    """ZeRO's stage and offloading from the file, where it is at hand, else from its name.

    Raises:
        RecipeError: the file is there and cannot be read.
    """
    settings = value if isinstance(value, dict) else _read_json(str(value), config)
    if others := [key for key in ("optimizer", "scheduler", "tensor_parallel", "autotp_size") if settings.get(key)]:
        return unsupported(f"its {others[0]} would decide in place of the configuration: the strategy's file has none")
    zero = settings.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    name = "" if isinstance(value, dict) else str(value).lower()
    named = re.search(r"zero[-_]?([123])", name)
    stage = zero.get("stage", int(named[1]) if named else None)
    offloads = bool(zero.get("offload_param") or zero.get("offload_optimizer")) if zero else "offload" in name
    if stage == 3:
        return Outcome(TRANSLATED, strategy="zero3_offload" if offloads else "zero3")
    if stage in (1, 2):
        why = "gradients are sharded too" if stage == 1 else "the optimizer's state stays on the GPUs" * offloads
        return Outcome(TRANSLATED, why, strategy="zero2")
    return left_out("its ZeRO stage cannot be told: with zero2.yaml or zero3.yaml the curve is the same")


def _read_json(name: str, config: Config) -> dict[str, Any]:
    file = None
    try:
        file = next((f for f in (config.file.parent / name, Path(name)) if f.is_file()), None)
        content = files.read_json(file) if file else {}
    except (ValueError, OSError) as error:
        raise RecipeError(
            f"deepspeed: {file or name} cannot be read: {error}", where=config.where("deepspeed")
        ) from None
    return content if isinstance(content, dict) else {}


def fsdp(value: Any, config: Config) -> Outcome:
    block = config.root.block("fsdp_config")
    offloads = block.get("offload_params") or block.get("fsdp_offload_params")
    offloads = offloads or "offload" in str(config.root.get("fsdp"))
    return Outcome(TRANSLATED, "FSDP version 2", strategy="fsdp_offload" if offloads else "fsdp")
