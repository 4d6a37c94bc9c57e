"""What a recipe becomes that trains on an adapter: with the adapter's values, or refused.

Files and JSON only: torch is not imported, so that a wrong start is reported at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.errors import ModelError, RecipeError, RecipeErrors
from stepladder.manifest import MANIFEST
from stepladder.model import start
from stepladder.model.adapter_config import ADAPTER, CHANGES_BASE
from stepladder.model.merge.weights import Weights, more
from stepladder.model.start import FIELDS, KEY
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.schema import known_keys

# It belongs to a training, not to the adapter: a recipe may set another.
OF_THE_TRAINING = "lora_dropout"
# Fields without a key of the recipe, which hold as the adapter has them.
KEPT = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "ensure_weight_tying"),
)
# Fields that change nothing as an adapter is trained on: labels, and how its first weights were drawn.
LABELS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "bias", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_core"),
}


def settle(recipe: Recipe) -> Recipe:
    """The recipe with the values of the adapter that it trains on; one that names a model stays as it is.

    Raises:
        ModelError: there is no such model, or an adapter that cannot be trained on.
        RecipeErrors: keys that contradict the adapter.
    """
    name, where = recipe.get(KEY), recipe.where(KEY)
    start.check_source(name, where)
    begun = start.of(name, recipe.get("model_revision"))
    start.check_finished(Path(name), where)
    if begun.adapter is None:
        return recipe
    _check_base(begun)
    if not recipe.get("use_peft"):
        raise _not_whole(recipe, name)
    _check_kind(begun, name)
    _check_tensors(begun, name)
    values = _values(begun, name)
    if wrong := list(_contradictions(recipe, begun, values)):
        raise RecipeErrors(wrong)
    new = {key: value for key, value in values.items() if key not in recipe.values}
    recipe.notes.extend(_notes(recipe, begun))
    return dataclasses.replace(
        recipe.with_values(**new), origins={**recipe.origins, **dict.fromkeys(new, begun.config_file)}
    )


def _check_base(begun: start.Start) -> None:
    """Raise ModelError unless the adapter's base is a model by itself."""
    place = begun.config_file
    start.check_source(begun.base, place)
    start.check_finished(Path(begun.base), place)
    if start.of(begun.base, begun.revision).adapter:
        raise ModelError(
            f"the base of {begun.adapter} is an adapter too: {begun.base}",
            where=place,
            why="one adapter on one base is trained on",
            help=f"{_merge(begun.base)}, then name merged/{Path(begun.base).name} as the base there",
        )


def _merge(name: str) -> str:
    adapter = name if Path(name).is_dir() else start.of(name).adapter or name  # one of the hub lies in its cache
    recipe = start.object_in(Path(adapter) / MANIFEST).get("recipe")
    return start.merge_command(adapter, recipe if isinstance(recipe, dict) else {}, f"merged/{Path(name).name}")


def _instead(name: str) -> str:
    """What helps where an adapter cannot be trained on: its merged model can."""
    return f"{_merge(name)}, then --{KEY} merged/{Path(name).name}"


def _not_whole(recipe: Recipe, name: str) -> RecipeError:
    said = "use_peft: false" if "use_peft" in recipe.values else "use_peft is not set"
    return RecipeError(
        f"{said}, and {name} is an adapter",
        where=recipe.where("use_peft" if "use_peft" in recipe.values else KEY),
        why="full fine-tuning trains whole weights, and an adapter is a change of its base's",
        help=f"use_peft: true trains the adapter on; for full fine-tuning merge it first:\n{_instead(name)}",
    )


def _check_kind(begun: start.Start, name: str) -> None:
    """Raise ModelError for what an adapter is or does that cannot be trained on."""
    config, place = begun.config, begun.config_file
    kind, task = config.get("peft_type"), config.get("task_type")
    what, help = "", _instead(name)
    if kind != "LORA":
        what = f"the adapter is {kind}, and only LoRA (with DoRA and rsLoRA) is trained on"
        if "PROMPT" in str(kind) or "PREFIX" in str(kind) or kind == "P_TUNING":  # no change of weights
            help = f"{KEY}: {begun.base}, and train it anew"
    elif task not in ("CAUSAL_LM", None):
        what = f"the adapter is for {task}, and causal language models are trained"
        help = "an adapter of task_type CAUSAL_LM"
    elif config.get("bias", "none") != "none":
        what = f"bias: {config['bias']}: the adapter has trained the base's own biases, which is not trained on"
    elif str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        what = f"init_lora_weights: {config['init_lora_weights']}: the adapter began by changing the base's own weights"
    else:
        rest = config.keys() - {*FIELDS.values(), *KEPT, *LABELS}
        if used := sorted(key for key in rest if config[key]):
            what = f"the adapter has {used[0]}: {json.dumps(config[used[0]])[:80]}, which is not trained on"
    if what:
        raise ModelError(what, where=place, help=help)


def _check_tensors(begun: start.Start, name: str) -> None:
    """Raise ModelError for weights of an adapter that its training on would leave out."""
    folder, whole = begun.adapter or Path(), tuple(map(str, begun.config.get("modules_to_save") or ()))
    tensors = Weights(folder, single=ADAPTER).tensors
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key and tensor.shape]
    rank = begun.config.get("r")
    if isinstance(rank, int) and ranks and not begun.config.get("rank_pattern") and rank > max(ranks):
        raise ModelError(
            f"the adapter's matrices have rank {max(ranks)}, and its configuration says r: {rank}",
            where=begun.config_file,
            help="copy or fetch the adapter again",
        )
    names = [key for key in tensors if ".lora_" not in key]
    others = sorted(key for key in names if not key.rpartition(".")[0].endswith(whole))  # PEFT's own rule
    if others:
        raise ModelError(
            f"the adapter holds weights of the base itself: {others[0]}{more(others)}",
            where=str(folder / ADAPTER),
            why="embeddings of added tokens, perhaps: they would not be trained on",
            help=_instead(name),
        )


def _values(begun: start.Start, name: str) -> dict[str, Any]:
    """The adapter's values by the recipe's keys; what PEFT leaves at its default is left out.

    Raises:
        ModelError: a value is of another kind than its key takes.
    """
    found: dict[str, Any] = {}
    for key, its in FIELDS.items():
        value = begun.config.get(its)
        if key == "lora_target_modules" and isinstance(value, str):
            value = [value]  # a regular expression, or all-linear
        if isinstance(value, list):
            value = sorted(value, key=str)
        if isinstance(value, float) and value.is_integer() and key != OF_THE_TRAINING:
            value = int(value)
        if value is None or (value is False and known_keys()[key].default is False):
            continue
        if not _is_right(key, value):
            raise ModelError(
                f"{its}: {json.dumps(value)[:80]} is no value of {key}",
                where=begun.config_file,
                help=_instead(name),
            )
        found[key] = value
    if "lora_r" not in found or "lora_alpha" not in found:
        raise ModelError(
            "the adapter has no rank (r) or no lora_alpha",
            where=begun.config_file,
            help="copy or fetch the adapter again",
        )
    return found


def _is_right(key: str, value: Any) -> bool:
    """Whether training takes the value; its kind is that of its field (adapter_config.py)."""
    if key == OF_THE_TRAINING:
        return bool(0 <= value < 1)
    if key in ("lora_r", "lora_alpha"):
        return isinstance(value, int) and value > 0
    return isinstance(value, bool) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _contradictions(recipe: Recipe, begun: start.Start, values: dict[str, Any]) -> Iterator[RecipeError]:
    """Keys that were set and say something else than the adapter."""
    name, keys = recipe.get(KEY), recipe.values
    for key in FIELDS:
        asked, has = recipe.get(key), values.get(key, known_keys()[key].default)
        if key in keys and key != OF_THE_TRAINING and not _agree(key, asked, has):
            yield RecipeError(
                f"{key}: {_shown(asked)}, and the adapter in {name} has {_shown(has)}",
                where=recipe.where(key),
                why="an adapter that is trained on keeps its form",
                help=f"{f'{key}: {_shown(has)}' if has else f'remove {key}'}; "
                f"or for a new adapter on top of this one:\n{_instead(name)}",
            )
    if recipe.get("peft_type") != "lora":
        yield RecipeError(
            f"peft_type: {recipe.get('peft_type')}, and the adapter in {name} is LoRA",
            where=recipe.where("peft_type"),
            help="remove peft_type",
        )
    revision = begun.revision or known_keys()["model_revision"].default
    if "model_revision" in keys and Path(name).is_dir() and keys["model_revision"] != revision:
        yield RecipeError(
            f"model_revision: {keys['model_revision']}, and the adapter in {name} is on {begun.base} at {revision}",
            where=recipe.where("model_revision"),
            help="remove model_revision",
        )


def _agree(key: str, value: Any, its: Any) -> bool:
    """Whether a key says what the adapter has; patterns of target modules are compared in the model (adapter.py)."""
    if key != "lora_target_modules" or value is None or its is None:
        same = [sorted(v) if isinstance(v, list) else v for v in (value, its)]
        return (same[0] or None) == (same[1] or None)
    plain = all(name.isidentifier() for name in [*value, *its])
    return {*value} == {*its} if plain else True


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list) else "none" if value is None else str(value)


def _notes(recipe: Recipe, begun: start.Start) -> Iterator[str]:
    """What holds without a key for it, and what differs from the adapter's own training."""
    if kept := [f"{key}: {json.dumps(begun.config[key])}" for key in KEPT if begun.config.get(key)]:
        yield f"{recipe.get(KEY)} keeps its {', '.join(kept)}"
    before = start.object_in((begun.adapter or Path()) / MANIFEST).get("recipe")
    if isinstance(before, dict):
        was, now = bool(before.get("load_in_4bit")), bool(recipe.get("load_in_4bit"))
        if was != now:
            bits = ("the base's own weights", "a base in 4 bits")
            yield f"{recipe.get(KEY)} was trained on {bits[was]}, and trains on with {bits[now]}"
