"""PEFT's configurations by the recipe's `peft_kwargs`, and whether each of its names and patterns does something.

PEFT itself is content where one name of a list matches a module, and silent where a pattern matches none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stepladder.errors import ModelError
from stepladder.model import initial_factors, start
from stepladder.settings import TUNERS, Settings
from stepladder.suggest import suggest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

KEY = "peft_kwargs"
# Fields that make layers differ: a plan that traces a few layers of the model leaves them out.
BY_LAYER = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")


def fields(recipe: Settings) -> dict[str, Any]:
    """The fields of PEFT's configuration that the recipe sets by `peft_kwargs`."""
    return {name: copy.deepcopy(value) for name, value in (recipe.get(KEY) or {}).items() if value is not None}


def chooses_layers(recipe: Settings) -> bool:
    """Whether the adapter may differ from layer to layer."""
    return any(fields(recipe).get(name) not in (None, {}, []) for name in BY_LAYER)


def without_layers(recipe: Settings) -> Settings:
    """The recipe with the same adapter in each layer, for a model of a few of them."""
    kept = {name: value for name, value in fields(recipe).items() if name not in BY_LAYER}
    return recipe.with_values(**{KEY: kept})


def tuner_config(recipe: Settings) -> PeftConfig:
    """PEFT's configuration of a method that is set by `peft_kwargs` alone.

    IA³ (Liu et al. 2022, arXiv:2205.05638) has one factor per activation of the chosen modules, VeRA (Kopiczko et al.
    2023, arXiv:2310.11454) two vectors per module around random projections that all share, and OFT (Qiu et al. 2023,
    arXiv:2306.07280) rotates blocks of a module's inputs.
    """
    from peft import IA3Config, OFTConfig, VeraConfig

    kind: Any = {"ia3": IA3Config, "vera": VeraConfig, "oft": OFTConfig}[recipe.get("peft_type")]
    return kind(task_type="CAUSAL_LM", revision=recipe.values.get("model_revision"), **fields(recipe))


def place(recipe: Settings, source: start.Start, field: str) -> tuple[str, str]:
    """What a person calls a field of the adapter's configuration, and where it is set."""
    if source.adapter:
        return field, source.config_file
    keys = {name: key for key, name in start.FIELDS.items()} if recipe.get("peft_type") not in TUNERS else {}
    key = keys.get(field, f"{KEY}.{field}")
    return key, recipe.where(key)


def check_names(wrapped: PeftModel, recipe: Settings, names: list[str], linear: list[str]) -> None:
    """Raise ModelError for a name, pattern or layer of `peft_kwargs`, or an initialization, without effect.

    Args:
        names: the modules of the model before PEFT's layers were put into it.
        linear: the last parts of the names of its linear layers.
    """
    initial_factors.check_layers(wrapped, recipe)
    _check_tuner(wrapped, recipe)
    for key, entry, why in _idle(wrapped, recipe, names):
        near = "" if entry in {*linear, *names} else suggest(str(entry), linear)
        raise ModelError(
            f"{key}: {entry} has no effect in this model", where=recipe.where(key), why=why, help=near or "remove it"
        )


def _check_tuner(wrapped: Any, recipe: Settings) -> None:
    """Raise ModelError for a layer that PEFT rotates by another block than the recipe says, or wraps unheard.

    PEFT takes the nearest size that divides a layer's width, with a warning among others.
    """
    size = wrapped.peft_config["default"].to_dict().get("oft_block_size")
    head = wrapped.get_base_model().get_output_embeddings()
    for name, layer in wrapped.get_base_model().named_modules():
        found = getattr(layer, "oft_block_size", None)
        if isinstance(found, dict) and found.get("default", size) != size:
            divisors = [n for n in range(2, layer.in_features + 1) if layer.in_features % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - size))[:2])
            raise ModelError(
                f"oft_block_size: {size} does not divide {layer.in_features}, the width of {name}",
                where=recipe.where(f"{KEY}.oft_block_size"),
                why="the blocks that are rotated lie side by side in a layer's input",
                help=f"oft_block_size: {' or '.join(map(str, near))}",
            )
        ends = layer is head and hasattr(layer, "base_layer")
        if recipe.get("peft_type") in TUNERS and (ends or len(getattr(layer, "oft_embedding_R", ()))):
            raise ModelError(
                f"peft_type: {recipe.get('peft_type')} cannot change {name}",
                where=recipe.where(f"{KEY}.target_modules"),
                why="the loss is computed from an output layer's weights alone, and embeddings are no linear layer",
                help="target_modules: all-linear, or names of the decoder's layers",
            )


def _idle(wrapped: Any, recipe: Settings, names: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Key, entry and reason of each entry that changes nothing."""
    from peft.utils.other import get_pattern_key

    values, config, tuner = fields(recipe), wrapped.peft_config["default"], wrapped.base_model
    targeted = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = list(values.get(field) or ())
        used = {get_pattern_key(patterns, name) for name in targeted}
        for entry in (entry for entry in patterns if entry not in used):
            yield (
                f"{KEY}.{field}",
                entry,
                "it matches no module that gets an adapter, or an earlier pattern matches them first",
            )
    layers = values.get("layers_to_transform")
    for number in [] if layers is None else layers if isinstance(layers, list) else [layers]:
        if not any(f".{number}." in name for name in targeted):
            yield f"{KEY}.layers_to_transform", number, "no module of a layer with this number gets an adapter"
    for entry in _entries(values.get("exclude_modules")):
        if not _excludes(config, entry, names):
            yield f"{KEY}.exclude_modules", entry, "no module that it names would get an adapter otherwise"
    for field in ("target_modules", "feedforward_modules"):
        value = values.get(field)
        entries = value if isinstance(value, list) else []  # PEFT refuses a pattern of targets that matches nothing
        for entry in (entry for entry in entries if not _ends(entry, targeted)):
            yield f"{KEY}.{field}", entry, "it names no module that gets an adapter"
    if isinstance(values.get("feedforward_modules"), str) and not any(
        module.is_feedforward for module in wrapped.modules() if hasattr(module, "is_feedforward")
    ):
        yield f"{KEY}.feedforward_modules", values["feedforward_modules"], "it matches no module that gets an adapter"
    if any(len(getattr(module, "lora_embedding_A", ())) for module in wrapped.modules()):
        if values.get("init_lora_weights", True) is not True:
            yield (
                f"{KEY}.init_lora_weights",
                values["init_lora_weights"],
                "PEFT begins an adapter on embeddings its own way",
            )
        if recipe.get("loraplus_lr_ratio"):
            why = "PEFT trains an adapter on embeddings with a learning rate of 1e-6, whatever the recipe's is"
            yield "loraplus_lr_ratio", recipe.get("loraplus_lr_ratio"), why


def _entries(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _ends(entry: str, names: list[str]) -> bool:
    return any(f".{name}".endswith(f".{entry}") for name in names)


def _excludes(config: Any, entry: str, names: list[str]) -> bool:
    """Whether a module that the targets name is kept without an adapter by this entry of `exclude_modules`."""
    from peft.tuners.tuners_utils import check_target_module_exists

    alone, without = copy.copy(config), copy.copy(config)
    alone.exclude_modules = entry if isinstance(config.exclude_modules, str) else {entry}
    without.exclude_modules = None
    return any(
        check_target_module_exists(without, name) and not check_target_module_exists(alone, name) for name in names
    )
