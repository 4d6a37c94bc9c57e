"""Several LoRA adapters combined into one before it is merged, by PEFT's `add_weighted_adapter`.

Their plain weighted sum needs none of this: PEFT merges one adapter after the other (`cat`).
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import flags
from stepladder.errors import ModelError, first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

SUM = "cat"
# PEFT's types that prune values, and need to know how many are kept. `svd` and its kin are left out: they cut the
# combined change down to a rank, and a merged model has none.
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = (SUM, "linear", *PRUNING)
RANDOM = ("dare_linear", "dare_ties")
COMBINED = "combined"
# Fields with which PEFT 0.21 combines something else than the adapters (peft#3761), or drops a part of them.
NOT_COMBINED = {
    "use_rslora": "PEFT scales the combined adapter by √r again",
    "lora_bias": "PEFT leaves the biases out",
    "modules_to_save": "whole modules are not combined",
    "target_parameters": "PEFT combines modules only",
}


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Args:
        type: PEFT's `combination_type`.
        density: the share of values that pruning keeps; None for a type that does not prune.
        seed: of the values that DARE drops; None for a type without random numbers.
    """

    type: str
    density: float | None = None
    seed: int | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=flags.finite, nargs="+", help="one per --adapter (default: 1 each)")
    parser.add_argument("--combination_type", "--combination-type", choices=TYPES, default=SUM, help="PEFT's")
    parser.add_argument("--density", type=flags.fraction, help="the share of values that pruning keeps: 0.2 to 0.5")
    parser.add_argument("--seed", type=flags.seed, help="of the values that DARE drops (default: 0)")


def from_flags(args: argparse.Namespace) -> Combination | None:
    """The combination that the flags ask for, None for the sum; `args.weights` has one weight per adapter after it.

    Raises:
        ModelError: flags that do not fit each other.
    """
    args.weights = args.weights or [1.0] * len(args.adapter)
    if len(args.weights) != len(args.adapter):
        raise ModelError(f"{len(args.adapter)} adapters and {len(args.weights)} weights", help="one per adapter")
    kind = args.combination_type
    if kind != SUM and len(args.adapter) == 1:
        raise ModelError(f"--combination_type {kind} with one adapter", help="a second --adapter, or remove it")
    if kind in PRUNING and args.density is None:
        raise ModelError(f"--combination_type {kind} needs --density", help="--density 0.5: half of the values stay")
    for flag, value, kinds in (("density", args.density, PRUNING), ("seed", args.seed, RANDOM)):
        if value is not None and kind not in kinds:
            raise ModelError(f"--{flag} has no effect with --combination_type {kind}", help="remove it")
    if kind == SUM:
        return None
    return Combination(kind, args.density, (args.seed or 0) if kind in RANDOM else None)


def check_configs(configs: list[PeftConfig], adapters: list[Path], combination: Combination) -> None:
    """Raise ModelError for an adapter of which PEFT would combine another one, or a part."""
    for config, folder in zip(configs, adapters, strict=True):
        why = next((why for field, why in NOT_COMBINED.items() if getattr(config, field, None)), "")
        kinds = [item.name for item in dataclasses.fields(config) if item.metadata.get("is_lora_variant")]
        if variant := next((name for name in kinds if getattr(config, name, None)), ""):
            why = f"{variant}: its change is not a product of two matrices alone"
        if getattr(config, "bias", "none") != "none":
            why = "trained biases are not combined"
        if why:
            raise ModelError(
                f"{folder} cannot be combined by {combination.type}",
                why=why,
                help=f"--combination_type {SUM}, the weighted sum",
            )


def combine(model: PeftModel, names: list[str], weights: list[float], combination: Combination) -> None:
    """Put the combination of a model's LoRA adapters into it, as the only active adapter.

    PEFT puts a new adapter on the device of its base layer, and the base here is on the meta device: it is given
    tensors of that shape without memory of their own meanwhile.

    Raises:
        ModelError: PEFT does not combine these adapters, or would leave modules out.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    for layer in layers.values():
        _fill(layer.get_base_layer(), lambda shape: torch.zeros((), device=device).expand(shape))
    torch.manual_seed(combination.seed or 0)
    try:
        model.base_model.add_weighted_adapter(
            names, weights, COMBINED, combination_type=combination.type, density=combination.density
        )
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: modules of other ranks
        raise ModelError(
            f"these adapters cannot be combined by {combination.type}",
            why=first_line(error),
            help=f"--combination_type {SUM}, the weighted sum",
        ) from None
    for layer in layers.values():
        _fill(layer.get_base_layer(), lambda shape: torch.empty(shape, device="meta"))
    if left := [name for name, layer in layers.items() if not _has(layer, COMBINED)]:
        raise ModelError(
            f"PEFT would leave {left[0]} out of the combined adapter",
            why="it takes the excluded modules and the layers of the first adapter for those of all",
            help=f"--combination_type {SUM}, the weighted sum; or the adapter that has this module first",
        )
    model.base_model.set_adapter(COMBINED, inference_mode=True)
    model.eval()


def _has(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _fill(module: torch.nn.Module, make: Any) -> None:
    import torch

    for part, parameter in module._parameters.items():
        if parameter is not None:
            setattr(module, part, torch.nn.Parameter(make(parameter.shape), requires_grad=False))
