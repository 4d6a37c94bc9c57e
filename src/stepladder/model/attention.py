"""The attention that a run takes, and whether the rows of its batches lie end to end, each attended by itself.

FlashAttention takes the rows' lengths (its varlen kernels). Without it the mask is the rows' lengths, and each row is
a causal product of its own: exact, and with neither padding nor a mask of all pairs of tokens. A GPU computes it in
bf16 or fp16, for which SDPA has a flash kernel. Where neither is exact, rows are padded; packed ones then need a mask
of all pairs of tokens.

Transformers' seam for it are the two registries of its guide "Attention backends".
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from transformers.utils.generic import is_flash_attention_requested

from stepladder.errors import ModelError, RecipeError, first_line
from stepladder.settings import Settings, has_virtual_tokens

BY_ROW = "sdpa_by_row"
GROUPED = 256  # numbers of a head, up to which SDPA's flash kernel lets a key's head serve several of the query's

# What Transformers compute of rows that lie end to end, architecture by architecture, is what tests/test_packing.py
# finds. A mask keeps them apart where it is made by positions; these make theirs without:
BLIND = {"afmoe", "bert-generation", "gpt_oss", "opt"}
# and these are of older code, and make it by positions all the same.
OLDER = {"codegen", "gpt_neox_japanese", "gptj", "stablelm"}
BY_LENGTH = {"full_attention", "sliding_attention"}  # layers in which FlashAttention keeps rows apart
BY_MASK = BY_LENGTH | {"chunked_attention", "indexed_attention"}

PACKAGE = "flash_attention_2"
KERNEL = FLASH_ATTN_KERNEL_FALLBACK[PACKAGE]  # the same, built for this PyTorch and CUDA, from the hub
CAPABILITY = (8, 0)  # flash kernels, SDPA's own too, are for Ampere and newer
MAX_HEAD_SIZE = 256  # numbers of a head that FlashAttention 2 takes at most
LAYOUTS = {True: "rows end to end, kept apart by a mask", False: "rows padded"}
PROBE = 3.0  # seconds in which the hub is to answer


@dataclass(frozen=True)
class Choice:
    """How a model attends, as run.json and the opening lines say it.

    `padding_free`: the rows of a batch lie end to end, without padding. `rows`: how they are kept apart. `why`: why
    there is no FlashAttention, or where it comes from, under `attn_implementation: auto` on a GPU.
    """

    implementation: str
    rows: str
    padding_free: bool
    why: str = ""

    def __str__(self) -> str:
        return f"{self.implementation}, {self.rows}" + f" ({self.why})" * bool(self.why)

    def facts_for_manifest(self) -> dict[str, Any]:
        """The choice as run.json has it."""
        return {"implementation": self.implementation, "rows": self.rows, "flat": self.padding_free, "why": self.why}


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
        RecipeError: rows shall lie end to end that would see each other, or FlashAttention to compute in fp32.
        ModelError: this rank cannot load what rank 0 takes.
    """
    why = ""
    if settings.get("attn_implementation") == "auto" and device == "cuda":
        flash_name, why = first(_find_flash(model, precision))
        if flash_name:
            set_implementation(model, flash_name)
    config = model.config.get_text_config()
    name, flash = config._attn_implementation, is_flash_attention_requested(config)
    fault, help = "", "attn_implementation: auto"
    if flash and precision == "fp32":
        fault, help = f"{name} computes in bf16 or fp16 only, and this run in fp32", f"bf16: true, or {help}"
    elif name == "flex_attention" and device == "cpu":
        fault, help = "flex_attention has no backward pass on a CPU", f"{help}, or sdpa"
    if fault:
        where = settings.where("attn_implementation")
        raise RecipeError(f"attn_implementation: {fault}", where=where, help=help)
    lengths = separates_rows(model, BY_LENGTH)
    virtual = has_virtual_tokens(settings)
    kernel = device == "cpu" or (device == "cuda" and precision != "fp32" and _capability() >= CAPABILITY)
    if flash:
        exact, rows = not virtual and lengths, "rows end to end"
    else:
        exact, rows = kernel and by_row(model, settings), "rows end to end, each by itself"
    separates = settings.get("packing_strategy") != "wrapped"  # `wrapped` cuts one endless text: there are no rows
    packs = [key for key in ("packing", "eval_packing") if settings.get(key) and separates]
    free = settings.get("padding_free")
    padding_free = free is True or "packing" in packs or (free == "auto" and exact)
    keys = [*packs, *["padding_free"] * (free is True)]
    if keys and not exact and (flash or not separates_by_mask(model)):
        raise RecipeError(
            f"{keys[0]}: {str(settings.get(keys[0])).lower()} with {config.model_type} under {name}: "
            "rows would see each other",
            where=settings.where(keys[0]),
            why=f"Transformers' {type(model).__name__} does not keep rows apart that lie end to end",
            help=f"{keys[0]}: false" + ", or FlashAttention on a GPU" * (not flash and lengths),
        )
    notes = _cost_notes(settings, name) if padding_free and not exact else []
    rows = rows if padding_free and exact else LAYOUTS[padding_free]
    return Choice(name if flash or not exact else "sdpa", rows, padding_free, why), notes


def separates_by_mask(model: PreTrainedModel) -> bool:
    """Whether the mask that Transformers make keeps rows apart that lie end to end."""
    blind = model.config.get_text_config().model_type in BLIND
    return not blind and separates_rows(model, BY_MASK)


def note_change(before: dict[str, Any], now: Choice) -> list[str]:
    """A note where a run that is resumed began with another attention (of an earlier version nothing is known)."""
    was = f"{before.get('implementation')}, {before.get('rows')}"
    same = not before or was == f"{now.implementation}, {now.rows}"
    return [] if same else [f"attention: {was} as the run began; its losses agree with these to rounding"]


def _cost_notes(settings: Settings, name: str) -> list[str]:
    micro, length = settings.get("per_device_train_batch_size"), settings.get("max_length")
    tokens = f"{micro} × {length:,} = {micro * length:,}" if length else f"{micro} rows"
    note = (
        f"{name} computes all pairs of a micro-batch's tokens ({tokens} at most), {micro} times as many as of its "
        "sequences one by one; per_device_train_batch_size: 1 computes no others"
    )
    return [note] if micro > 1 else []


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _find_flash(model: PreTrainedModel, precision: str) -> tuple[str, str]:
    """FlashAttention 2 by its name, where GPU, model and packages have it, else nothing; and why."""
    if precision == "fp32":
        return "", "FlashAttention computes in bf16 or fp16 only"
    if _capability() < CAPABILITY:
        return "", "FlashAttention needs compute capability 8.0, and this GPU has {}.{}".format(*_capability())
    compatible = getattr(model, "_compatible_flash_implementations", None) or [PACKAGE, KERNEL]
    config = model.config.get_text_config()
    heads = [getattr(config, key, None) or 0 for key in ("head_dim", "global_head_dim")]
    size = max(heads) or config.hidden_size // config.num_attention_heads
    if not model._supports_flash_attn or not {PACKAGE, KERNEL}.intersection(compatible) or size > MAX_HEAD_SIZE:
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
            faults.append(f"{name} cannot be loaded: {first_line(error)}")
        else:
            return name, f"{package} is installed"
    return "", "; ".join(faults)


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Let `model` attend by what rank 0 does, and load its kernels in this process.

    Raises:
        ModelError: this process cannot load them.
    """
    try:
        model.set_attn_implementation("eager")  # else Transformers does nothing where the name stands already
        model.set_attn_implementation(name)
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(
            f"rank 0 attends by {name}, and this rank cannot load it",
            why=first_line(error),
            help="the same packages on every node, or attn_implementation: sdpa",
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


def by_row(model: PreTrainedModel, settings: Settings) -> bool:
    """Let `model` attend row by row, and say whether it does, so that the rows of a batch may lie end to end.

    That takes layers of plain causal SDPA, and rows with nothing before them, as virtual tokens are.
    """
    if has_virtual_tokens(settings):
        return False
    if settings.get("padding_free") is False and not settings.get("packing"):
        return False
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    if not separates_rows(model, {"full_attention"}) or config.model_type in BLIND:
        return False
    model.set_attn_implementation(BY_ROW)
    return True


def separates_rows(model: PreTrainedModel, layers: set[str]) -> bool:
    """Whether rows that lie end to end do not see each other, if layers of these kinds keep them apart.

    Not where a layer hands a state on from token to token (Mamba, short convolutions), positions are counted from the
    padding (BERT's family), or a bias grows with the distance (ALiBi, in older code).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    newer = model._supports_attention_backend or config.model_type in OLDER
    return newer and kinds <= layers and not model._is_stateful and not hasattr(config, "type_vocab_size")


def lengths_as_mask(lengths: torch.Tensor) -> torch.Tensor:
    """Tokens of each row [rows] as what stands for a mask, which models hand on as it is: [1, 1, 1, rows], int64."""
    return lengths[None, None, None]


@torch.compiler.disable  # what it gives has the shape of the rows, each batch another
def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The lengths of the rows in one sequence; for any other batch, the mask that SDPA takes."""
    end_to_end = batch_size == 1 and q_length == kv_length and attention_mask is None and not allow_is_causal_skip
    lengths = None if use_vmap or not end_to_end else _lengths(mask_function, q_length, device)
    if lengths is None or (local_size is not None and int(lengths.max()) > local_size):  # a window that cuts a row
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    return lengths_as_mask(lengths)


def _lengths(mask_function: Callable[..., torch.Tensor], tokens: int, device: torch.device | str) -> torch.Tensor:
    """Tokens of each row, on the host: a GPU is waited for once here, and not once more in each layer that asks."""
    at, first = torch.arange(1, tokens, device=device), torch.zeros(1, dtype=torch.long, device=device)
    # A row begins where a token does not see the one before it.
    begins = (~mask_function(first, first, at, at - 1)).cpu().nonzero().flatten() + 1
    return torch.cat([begins.new_zeros(1), begins, begins.new_tensor([tokens])]).diff()


@torch.compiler.disable
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    compute: Callable[..., torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Query [rows, heads, tokens, size] to output [rows, tokens, heads, size]; other than causal rows as SDPA does."""
    masked = attention_mask is not None and attention_mask.dtype != torch.long
    causal = query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    biased = any(kwargs.get(key) is not None for key in ("position_bias", "softcap"))
    if masked or biased or not causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    tokens, longest = query.shape[2], kwargs.get("max_length_q")  # the collator's, where the model hands it on
    if attention_mask is None and longest is not None and longest < tokens:
        kind = getattr(module.config, "model_type", "this model")
        raise ModelError(
            f"the rows of a batch lie end to end, and {kind} does not keep them apart",
            why="it makes its attention mask without their positions: each row would see those before it",
            help="padding_free: false, and no packing",
        )
    [[[lengths]]] = [[[[tokens]]]] if attention_mask is None else attention_mask.tolist()
    device = query.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    with torch.autocast(device, enabled=False):
        out = compute(query, key, value, lengths, dropout, scaling, low)
    return out.to(value.dtype), None


def causal_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    dropout: float,
    scaling: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Causal SDPA of each row by itself in `dtype`; the rows' `lengths` sum up to the tokens. As `_attend` else."""
    rows = zip(*(tensor.to(dtype).split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_causal(q, k, v, dropout, scaling) for q, k, v in rows], dim=1)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and not key.shape[-1] == value.shape[-1] <= GROUPED:  # else no kernel but the one that holds all scores
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def register(name: str, compute: Callable[..., torch.Tensor]) -> None:
    """Let Transformers know attention row by row, computed as `causal_rows` is, by a name."""
    AttentionInterface.register(name, functools.partial(_attend, compute=compute))
    AttentionMaskInterface.register(name, _mask)


register(BY_ROW, causal_rows)
