"""Which attention a run takes, and whether the rows of its batches lie end to end: decided once, for all that ask.

FlashAttention takes the rows' lengths (its varlen kernels); without it each row is a product of its own (`attention`).
Where neither is exact, rows are padded; packed ones then need a mask of all pairs of tokens, or see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from transformers.utils.generic import is_flash_attention_requested

from stepladder.errors import ModelError, RecipeError
from stepladder.model import attention
from stepladder.settings import Settings

PACKAGE = "flash_attention_2"
KERNEL = FLASH_ATTN_KERNEL_FALLBACK[PACKAGE]  # the same, built for this PyTorch and CUDA, from the hub
CAPABILITY = (8, 0)  # flash kernels, SDPA's own too, are for Ampere and newer
HEAD = 256  # numbers of a head that FlashAttention 2 takes at most
PROBE = 3.0  # seconds in which the hub is to answer


@dataclass(frozen=True)
class Choice:
    """What run.json and the opening lines say of a run's attention.

    `flat`: the rows of a batch lie end to end, without padding. `rows`: how they are kept apart. `why`: why there is
    no FlashAttention, or where it comes from, under `attn_implementation: auto` on a GPU.
    """

    implementation: str
    rows: str
    flat: bool
    why: str = ""

    def __str__(self) -> str:
        return f"{self.implementation}, {self.rows}" + f" ({self.why})" * bool(self.why)


def settle(
    model: PreTrainedModel,
    settings: Settings,
    precision: str,
    device: str,
    first: Callable[[Any], Any] = lambda value: value,
) -> tuple[Choice, list[str]]:
    """Let `model` attend as `attn_implementation` says, and for `auto` by the fastest that is exact and at hand.

    Args:
        precision: that training computes in: `bf16`, `fp16` or `fp32`.
        device: the kind that it computes on: `cpu`, `cuda` or `mps`.
        first: rank 0's value on every rank, so that all take the same.

    Returns:
        The choice, and notes on what it costs.

    Raises:
        RecipeError: rows are asked to lie end to end that would see each other, or FlashAttention to compute in fp32.
        ModelError: this rank cannot load what rank 0 takes.
    """
    why = ""
    if settings.get("attn_implementation") == "auto" and device == "cuda":
        name, why = first(_flash(model, precision))
        if name:
            _take(model, name)
    config = model.config.get_text_config()
    named, flash = config._attn_implementation, is_flash_attention_requested(config)
    if flash and precision == "fp32":
        raise RecipeError(
            f"attn_implementation: {named} computes in bf16 or fp16 only, and this run in fp32",
            where=settings.where("attn_implementation"),
            way_out="bf16: true, or attn_implementation: auto",
        )
    if named == "flex_attention" and device == "cpu":
        raise RecipeError(
            "attn_implementation: flex_attention has no backward pass on a CPU",
            where=settings.where("attn_implementation"),
            way_out="attn_implementation: auto, or sdpa",
        )
    lengths = attention.kept_apart(model, attention.BY_LENGTH)
    virtual = settings.get("use_peft") and settings.get("peft_type") != "lora"
    kernel = device == "cpu" or (device == "cuda" and precision != "fp32" and _capability() >= CAPABILITY)
    if flash:
        exact, rows = not virtual and lengths, "rows end to end"
    else:
        exact, rows = kernel and attention.by_row(model, settings, device == "cpu"), "rows end to end, each by itself"
    separates = settings.get("packing_strategy") != "wrapped"  # `wrapped` cuts one endless text: there are no rows
    packs = [key for key in ("packing", "eval_packing") if settings.get(key) and separates]
    free = settings.get("padding_free")
    flat = free is True or "packing" in packs or (free == "auto" and exact)
    asked = [*packs, *["padding_free"] * (free is True)]
    if asked and not exact and (flash or not masked(model)):
        raise RecipeError(
            f"{asked[0]}: {str(settings.get(asked[0])).lower()} with {config.model_type} under {named}: "
            "rows would see each other",
            where=settings.where(asked[0]),
            why=f"Transformers' {type(model).__name__} does not keep rows apart that lie end to end",
            way_out=f"{asked[0]}: false" + ", or FlashAttention on a GPU" * (not flash and lengths),
        )
    notes = [_cost(settings, named)] if flat and not exact and settings.get("per_device_train_batch_size") > 1 else []
    return Choice(named if flash or not exact else "sdpa", rows if flat and exact else _LAID[flat], flat, why), notes


_LAID = {True: "rows end to end, kept apart by a mask", False: "rows padded"}


def masked(model: PreTrainedModel) -> bool:
    """Whether the mask that Transformers make keeps rows apart that lie end to end."""
    blind = model.config.get_text_config().model_type in attention.BLIND
    return not blind and attention.kept_apart(model, attention.BY_MASK)


def changed(before: dict[str, Any], now: Choice) -> list[str]:
    """A note where a run that is resumed began with another attention (of an earlier version nothing is known)."""
    was = f"{before.get('implementation')}, {before.get('rows')}"
    same = not before or was == f"{now.implementation}, {now.rows}"
    return [] if same else [f"attention: {was} as the run began; its losses agree with these to rounding"]


def _cost(settings: Settings, named: str) -> str:
    micro, length = settings.get("per_device_train_batch_size"), settings.get("max_length")
    tokens = f"{micro} × {length:,} = {micro * length:,}" if length else f"{micro} rows"
    return (
        f"{named} computes all pairs of a micro-batch's tokens ({tokens} at most), {micro} times as many as of its "
        "sequences one by one; per_device_train_batch_size: 1 computes no others"
    )


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _flash(model: PreTrainedModel, precision: str) -> tuple[str, str]:
    """FlashAttention 2 by its name, where GPU, model and packages have it, else nothing; and why."""
    if precision == "fp32":
        return "", "FlashAttention computes in bf16 or fp16 only"
    if _capability() < CAPABILITY:
        return "", "FlashAttention needs compute capability 8.0, and this GPU has {}.{}".format(*_capability())
    named = getattr(model, "_compatible_flash_implementations", None) or [PACKAGE, KERNEL]
    config = model.config.get_text_config()
    heads = [getattr(config, key, None) or 0 for key in ("head_dim", "global_head_dim")]
    size = max(heads) or config.hidden_size // config.num_attention_heads
    if not model._supports_flash_attn or not {PACKAGE, KERNEL}.intersection(named) or size > HEAD:
        return "", f"{type(model).__name__} does not take FlashAttention 2"
    faults = []
    for name, package, installed in (
        (PACKAGE, "flash_attn", is_flash_attn_2_available()),
        (KERNEL, "kernels", is_kernels_available()),
    ):
        if not installed:
            faults.append(f"{package} is not installed, or not in a version that Transformers take")
            continue
        try:  # a package that was built for another PyTorch raises whatever its loader does
            with _cache_only_unless_reachable() if name == KERNEL else contextlib.nullcontext():
                lazy_import_flash_attention(name)
        except Exception as error:
            faults.append(f"{name} cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
        else:
            return name, f"{package} is installed"
    return "", "; ".join(faults)


def _take(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(
            f"rank 0 attends by {name}, and this rank cannot load it",
            why=str(error).strip().splitlines()[0],
            way_out="the same packages on every node, or attn_implementation: sdpa",
            this_rank_only=True,
        ) from None


@contextlib.contextmanager
def _cache_only_unless_reachable() -> Iterator[None]:
    """Within it the hub counts as offline unless it answers at once: `kernels` would wait for it, again and again."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=PROBE)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
