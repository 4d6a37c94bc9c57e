"""The weights that a QLoRA adapter saw in training: the base's, to 4 bits and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepladder import hardware
from stepladder.errors import ModelError

if TYPE_CHECKING:
    import torch


def names(model: Any) -> dict[str, bool]:
    """The weights that bitsandbytes quantizes, by Transformers' own rule, and whether it turns them first (Conv1D)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


class RoundTrip:
    """bitsandbytes' 4-bit quantization and its inverse, as in training (Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        quant_type: `nf4` or `fp4`.
        nested: whether the constants are quantized too.
        dtype: what the weights were loaded in before they were quantized, and computed in after.
    """

    def __init__(self, quant_type: str, nested: bool, dtype: torch.dtype):
        self.quant_type, self.nested, self.dtype = quant_type, nested, dtype

    def __call__(self, weight: torch.Tensor, turned: bool = False) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = (weight.T if turned else weight).to(self.dtype).contiguous()
        packed, state = quantize_4bit(weight, quant_type=self.quant_type, compress_statistics=self.nested)
        back = dequantize_4bit(packed, state)
        return back.T if turned else back


def choose(choice: str | None, trained: dict[str, Any]) -> RoundTrip | None:
    """Which base the adapter goes onto: None for the base's own weights.

    Args:
        choice: `original`, `dequantized`, or None where nobody chose.
        trained: the adapter's run.json; empty where the adapter was trained elsewhere.

    Raises:
        ModelError: the adapter was trained in 4 bits and nobody chose, or the choice has no effect.
    """
    recipe = trained.get("recipe", {})
    if trained and not recipe.get("load_in_4bit"):
        if choice:
            raise ModelError(
                "--quantized_base has no effect here: the adapter's base was not in 4 bits", help="remove it"
            )
        return None
    if trained and not choice:
        raise ModelError(
            "the adapter was trained on a base in 4 bits: which one is it merged into?",
            why="original: the base's own weights, which the adapter never saw; nearer to the base elsewhere.\n"
            "dequantized: the weights that it saw; answers as in training, with the rounding to 4 bits in all layers.\n"
            "docs/merge.md measures both",
            help="--quantized_base original, or --quantized_base dequantized",
        )
    if choice != "dequantized":
        return None
    dtype = hardware.dtype_of(trained.get("precision", "bf16"))
    return RoundTrip(recipe.get("bnb_4bit_quant_type", "nf4"), recipe.get("use_bnb_nested_quant", True), dtype)
