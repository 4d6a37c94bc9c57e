"""A recipe that continues an adapter takes the adapter's values, or is refused.

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
from stepladder.model.start import ADAPTER, CHANGES_BASE, FIELDS, MODEL_KEY
from stepladder.model.weights import Weights, more
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.schema import known_keys

DROPOUT = "lora_dropout"  # it belongs to a training, not to the adapter: a recipe may set another
# Fields without a key of the recipe, which hold as the adapter has them.
KEPT = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "ensure_weight_tying", "trainable_token_indices"),
)
ROWS = ".token_adapter.trainable_tokens_delta"  # rows of embeddings in an adapter's file
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
    name, where = recipe.get(MODEL_KEY), recipe.where(MODEL_KEY)
    start.check_source(name, where)
    source = start.resolve_model(name, recipe.get("model_revision"))
    start.check_finished(Path(name), where)
    if source.adapter is None:
        return recipe
    _check_base(source)
    if not recipe.get("use_peft"):
        key = "use_peft" if "use_peft" in recipe.values else MODEL_KEY
        raise RecipeError(
            f"{'use_peft is not set' if key == MODEL_KEY else 'use_peft: false'}, and {name} is an adapter",
            where=recipe.where(key),
            why="full fine-tuning trains whole weights, and an adapter is a change of its base's",
            help=f"use_peft: true trains the adapter on; for full fine-tuning merge it first:\n{_merge_first(name)}",
        )
    _check_kind(source, name)
    _check_tensors(source, name)
    values = _values(source, name)
    if wrong := list(_contradictions(recipe, source, values)):
        raise RecipeErrors(wrong)
    new = {key: value for key, value in values.items() if key not in recipe.values}
    recipe.notes.extend(_notes(recipe, source))
    return dataclasses.replace(
        recipe.with_values(**new), origins={**recipe.origins, **dict.fromkeys(new, source.config_file)}
    )


def _check_base(source: start.Start) -> None:
    """Raise ModelError unless the adapter's base is a model by itself."""
    place = source.config_file
    start.check_source(source.base, place)
    start.check_finished(Path(source.base), place)
    if start.resolve_model(source.base, source.revision).adapter:
        raise ModelError(
            f"the base of {source.adapter} is an adapter too: {source.base}",
            where=place,
            why="one adapter on one base is trained on",
            help=f"{_merge(source.base)}, then name merged/{Path(source.base).name} as the base there",
        )


def _merge(name: str) -> str:
    # One of the hub lies in its cache.
    adapter = name if Path(name).is_dir() else start.resolve_model(name).adapter or name
    recipe = start.read_if_readable(Path(adapter) / MANIFEST).get("recipe")
    return start.merge_command(adapter, recipe if isinstance(recipe, dict) else {}, f"merged/{Path(name).name}")


def _merge_first(name: str) -> str:
    """What helps where an adapter cannot be trained on: its merged model can."""
    return f"{_merge(name)}, then --{MODEL_KEY} merged/{Path(name).name}"


def _check_kind(source: start.Start, name: str) -> None:
    """Raise ModelError for what an adapter is or does that cannot be trained on."""
    config, place = source.config, source.config_file
    kind, task = config.get("peft_type"), config.get("task_type")
    what, help = "", _merge_first(name)
    if kind != "LORA":
        what = f"the adapter is {kind}, and only LoRA (with DoRA and rsLoRA) is trained on"
        if "PROMPT" in str(kind) or "PREFIX" in str(kind) or kind == "P_TUNING":  # no change of weights
            help = f"{MODEL_KEY}: {source.base}, and train it again"
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


def _check_tensors(source: start.Start, name: str) -> None:
    """Raise ModelError for weights of an adapter that its training on would leave out."""
    folder, whole = source.adapter or Path(), tuple(map(str, source.config.get("modules_to_save") or ()))
    tensors = Weights(folder, single=ADAPTER).tensors
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key and tensor.shape]
    rank = source.config.get("r")
    if isinstance(rank, int) and ranks and not source.config.get("rank_pattern") and rank > max(ranks):
        raise ModelError(
            f"the adapter's matrices have rank {max(ranks)}, and its configuration says r: {rank}",
            where=source.config_file,
            help="copy or fetch the adapter again",
        )
    names = [key for key in tensors if ".lora_" not in key]
    if source.config.get("trainable_token_indices"):
        rows = {key for key in names if key.endswith(ROWS)}
        names = [key for key in names if key not in rows]
        if not rows:
            raise ModelError(
                "the adapter holds no rows of the embeddings, and its configuration has trainable_token_indices",
                where=source.config_file,
                help="copy or fetch the adapter again",
            )
    others = sorted(key for key in names if not key.rpartition(".")[0].endswith(whole))  # PEFT's own rule
    if others:
        raise ModelError(
            f"the adapter holds weights of the base itself: {others[0]}{more(others)}",
            where=str(folder / ADAPTER),
            why="embeddings of added tokens, perhaps: they would not be trained on",
            help=_merge_first(name),
        )


def _values(source: start.Start, name: str) -> dict[str, Any]:
    """The adapter's values by the recipe's keys; what PEFT leaves at its default is left out.

    Raises:
        ModelError: a value is of another kind than its key takes.
    """
    values: dict[str, Any] = {}
    for key, its in FIELDS.items():
        value: Any = source.config.get(its)
        if key == "lora_target_modules" and isinstance(value, str):
            value = [value]  # a regular expression, or all-linear
        if isinstance(value, list):
            value = sorted(value, key=str)
        if isinstance(value, float) and value.is_integer() and key != DROPOUT:
            value = int(value)
        if value is None or (value is False and known_keys()[key].default is False):
            continue
        if key == DROPOUT:
            is_right = bool(0 <= value < 1)
        elif key in ("lora_r", "lora_alpha"):
            is_right = isinstance(value, int) and value > 0
        else:
            is_right = isinstance(value, bool) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if not is_right:
            raise ModelError(
                f"{its}: {json.dumps(value)[:80]} is no value of {key}",
                where=source.config_file,
                help=_merge_first(name),
            )
        values[key] = value
    if "lora_r" not in values or "lora_alpha" not in values:
        raise ModelError(
            "the adapter has no rank (r) or no lora_alpha",
            where=source.config_file,
            help="copy or fetch the adapter again",
        )
    return values


def _contradictions(recipe: Recipe, source: start.Start, values: dict[str, Any]) -> Iterator[RecipeError]:
    """Keys that were set and say something else than the adapter."""
    name, keys = recipe.get(MODEL_KEY), recipe.values
    for key in FIELDS:
        value, has = recipe.get(key), values.get(key, known_keys()[key].default)
        if key in keys and key != DROPOUT and not _agrees(key, value, has):
            yield RecipeError(
                f"{key}: {_format(value)}, and the adapter in {name} has {_format(has)}",
                where=recipe.where(key),
                why="an adapter that is trained on keeps its form",
                help=f"{f'{key}: {_format(has)}' if has else f'remove {key}'}; "
                f"or for a new adapter on top of this one:\n{_merge_first(name)}",
            )
    for field, value in (recipe.get("peft_kwargs") or {}).items():
        its = source.config.get(field)
        same = [sorted(v, key=str) if isinstance(v, list) else v or None for v in (value, its)]
        if same[0] != same[1] and (field in KEPT or value is not True):
            kept = f"has {_format(its)}" if field in KEPT else "has its weights already"
            yield RecipeError(
                f"peft_kwargs.{field}: {_format(value)}, and the adapter in {name} {kept}",
                where=recipe.where(f"peft_kwargs.{field}"),
                why="an adapter that is trained on keeps its form",
                help=f"remove it; or for a new adapter on top of this one:\n{_merge_first(name)}",
            )
    if recipe.get("peft_type") != "lora":
        yield RecipeError(
            f"peft_type: {recipe.get('peft_type')}, and the adapter in {name} is LoRA",
            where=recipe.where("peft_type"),
            help="remove peft_type",
        )
    revision = source.revision or known_keys()["model_revision"].default
    if "model_revision" in keys and Path(name).is_dir() and keys["model_revision"] != revision:
        yield RecipeError(
            f"model_revision: {keys['model_revision']}, and the adapter in {name} is on {source.base} at {revision}",
            where=recipe.where("model_revision"),
            help="remove model_revision",
        )


def _agrees(key: str, value: Any, its: Any) -> bool:
    """Whether a key says what the adapter has; patterns of target modules are compared in the model (build.py)."""
    if key != "lora_target_modules" or value is None or its is None:
        same = [sorted(v) if isinstance(v, list) else v for v in (value, its)]
        return (same[0] or None) == (same[1] or None)
    plain = all(name.isidentifier() for name in [*value, *its])
    return {*value} == {*its} if plain else True


def _format(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else "none" if value is None else str(value)


def _notes(recipe: Recipe, source: start.Start) -> Iterator[str]:
    """What holds without a key for it, and what differs from the adapter's own training."""
    if kept := [f"{key}: {json.dumps(source.config[key])[:80]}" for key in KEPT if source.config.get(key)]:
        yield f"{recipe.get(MODEL_KEY)} keeps its {', '.join(kept)}"
    before = start.read_if_readable((source.adapter or Path()) / MANIFEST).get("recipe")
    if isinstance(before, dict):
        was, now = bool(before.get("load_in_4bit")), bool(recipe.get("load_in_4bit"))
        if was != now:
            bits = ("the base's own weights", "a base in 4 bits")
            yield f"{recipe.get(MODEL_KEY)} was trained on {bits[was]}, and trains on with {bits[now]}"
