"""What training starts from: a model, or an adapter on its base that is trained on.

Files and JSON only: torch is not imported, so that a wrong start is reported at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import files
from stepladder.console import quoted
from stepladder.data import templates
from stepladder.errors import ModelError, RecipeError, RecipeErrors
from stepladder.files import read_object
from stepladder.model.adapter_config import ADAPTER, CHANGES_BASE, CONFIG, check_config
from stepladder.model.merge.weights import Weights, more
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.schema import known_keys
from stepladder.run import MANIFEST, status
from stepladder.settings import Settings

if TYPE_CHECKING:
    from peft import LoraConfig

CHECKPOINT = "COMPLETE.json"
KEY = "model_name_or_path"
# PEFT's fields by the recipe's keys for them.
FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
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


@dataclass(frozen=True)
class Start:
    """What a name stands for.

    Args:
        base: the model whose weights are loaded, a folder or a hub id, and its `revision` on the hub.
        adapter: the folder of the adapter on it; None for a model.
        config: the adapter's adapter_config.json.
    """

    base: str
    revision: str | None = None
    adapter: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter, with the chat template that it was trained by."""
        return self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()

    def lora_config(self, recipe: Settings) -> LoraConfig:
        """PEFT's configuration of the adapter, with the recipe's dropout; ValueError where PEFT finds a fault."""
        from peft import LoraConfig

        known = {item.name for item in dataclasses.fields(LoraConfig)}
        values = {name: value for name, value in self.config.items() if name in known and name != "auto_mapping"}
        return LoraConfig(**{
            **values, "lora_dropout": recipe.get(OF_THE_TRAINING), "task_type": "CAUSAL_LM", "inference_mode": False,
        })  # fmt: skip


def of(name: str, revision: str | None = None) -> Start:
    """The model or adapter of a name: a folder, or a hub id; of a repository that is not in the cache, a model.

    Raises:
        ModelError: an adapter_config.json that cannot be read, or that names no base model.
    """
    folder = Path(name) if Path(name).is_dir() else _cached_adapter(name, revision)
    if folder is None or not (folder / CONFIG).is_file():
        return Start(name, revision)
    config = _config(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"the adapter in {folder} names no base model",
            where=str(folder / CONFIG),
            way_out='write it there: "base_model_name_or_path": "a folder, or a hub id"',
        )
    revision = config.get("revision")
    return Start(_found(base, folder), revision if isinstance(revision, str) else None, folder, config)


def of_recipe(recipe: Settings) -> Start:
    """What the recipe's `model_name_or_path` stands for; raises as `of`."""
    return of(recipe.get(KEY) or "", recipe.get("model_revision"))


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the values of the adapter that it trains on; one that names a model stays as it is.

    Raises:
        ModelError: there is no such model, or an adapter that cannot be trained on.
        RecipeErrors: keys that contradict the adapter.
    """
    name, where = recipe.get(KEY), recipe.where(KEY)
    check_source(name, where)
    start = of(name, recipe.get("model_revision"))
    check_finished(Path(name), where)
    if start.adapter is None:
        return recipe
    _check_base(start)
    if not recipe.get("use_peft"):
        raise _not_whole(recipe, name)
    _check_kind(start, name)
    _check_tensors(start, name)
    values = _values(start, name)
    if wrong := list(_contradictions(recipe, start, values)):
        raise RecipeErrors(wrong)
    new = {key: value for key, value in values.items() if key not in recipe.values}
    place = str(start.adapter / CONFIG)
    recipe.notes.extend(_notes(recipe, start))
    return dataclasses.replace(recipe.with_values(**new), origins={**recipe.origins, **dict.fromkeys(new, place)})


def template_notes(recipe: Settings, own: Any, chosen: Any) -> list[str]:
    """That the recipe chooses another chat template than the one that lies beside the adapter.

    Args:
        own: the template of the tokenizer as it was loaded, and `chosen` the one that rows are rendered by.
    """
    if not own or own == chosen or not of_recipe(recipe).has_tokenizer:
        return []
    keys = [key for key in templates.KEYS if recipe.get(key)]
    return [
        f"{recipe.where(k)}: {k} is another template than the adapter was trained by, which lies beside it"
        for k in keys
    ]


def checked(name: str, base: str | None = None) -> Start:
    """The model or adapter of a name, to be used as it is: it is there, and so is an adapter's base.

    Args:
        base: where an adapter's base lies, in place of where the adapter says.

    Raises:
        ModelError: one of them is not there; `base` is given for a model that is none on another one.
    """
    check_source(name)
    start = of(name)
    if start.adapter is None:
        if base:
            raise ModelError(f"--base {base}: {name} is a model by itself, not an adapter", way_out="leave out --base")
        return start
    if base:
        check_source(base, "--base")
        return dataclasses.replace(start, base=base, revision=None)
    try:
        check_source(start.base)
    except ModelError as error:
        raise ModelError(
            f"the base of the adapter {name} cannot be used: {error.what}",
            where=str(start.adapter / CONFIG),
            why=error.why,
            way_out="--base with the folder or hub id where it is now",
        ) from None
    return start


def facts(recipe: Settings) -> dict[str, Any]:
    """For run.json: the base, and the adapter that training starts from with the run that made it."""
    start = of_recipe(recipe)
    if start.adapter is None:
        return {"base": start.base}
    found: dict[str, Any] = {"base": start.base, "adapter": str(recipe.get(KEY))}
    if before := object_in(start.adapter / MANIFEST):
        found |= {"recipe_hash": before.get("recipe_hash"), "step": before.get("result_step")}
    return found


def check_source(name: str | None, where: str = "") -> None:
    """Raise ModelError unless `name` is a model folder with safetensors, an adapter, or can be a hub id.

    The files of a folder are looked at before a library opens them: a pipe would be waited for until the job ends.
    """
    if not name:
        raise ModelError("no model is named", where=where, way_out="model_name_or_path: a folder or a hub id")
    if fault := files.name_fault(name):
        raise ModelError(f"'{name[:60]}…' names no model: {fault}", where=where, way_out="a folder or a hub id")
    folder = Path(name)
    if not folder.is_dir():
        if _looks_local(name):
            fetch = "python scripts/fetch_model.py" if "smollm2-135m-instruct" in name else "check the path"
            raise ModelError(f"there is no model at '{name}'", where=where, way_out=fetch)
        return
    check_files(folder, where)
    if (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        if not list(folder.glob("*.safetensors")):
            raise ModelError(
                f"{folder} holds no safetensors file",
                where=where,
                why="weights are read from safetensors only: a pickled file can run code when it is opened",
                way_out="convert the weights to safetensors, or fetch the model again",
            )
        return
    if (folder / MANIFEST).is_file():
        raise ModelError(
            f"{folder} holds no model yet: the run has not finished",
            where=where,
            why=f"{MANIFEST} lies there, and no config.json",
            way_out="the same sft.py command again goes on with it",
        )
    if (folder / CHECKPOINT).is_file():
        raise ModelError(
            f"{folder} is a checkpoint, which resumes its own run and is no model",
            where=where,
            why="it holds the trained weights and the optimizer's state, without a configuration or a tokenizer",
            way_out=f"the result of its run: {folder.parent}; or resume that run: --resume {folder}",
        )
    raise ModelError(f"{folder} is no model: it has no config.json", where=where, way_out="check the path")


def check_files(folder: Path, where: str = "") -> None:
    """Raise ModelError for a file of a folder that a library would wait for, or end in a traceback at."""
    try:
        if folder.is_dir():
            files.check_model_folder(folder)
    except ValueError as error:
        raise ModelError(str(error), where=where, way_out="fetch or copy the model again") from None


def _looks_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "models/", "runs/")) or name.count("/") > 1


def _found(base: str, folder: Path) -> str:
    """A base by the name that an adapter has for it.

    A relative path is one of the folder that the adapter's training was started in. Where it leads nowhere from
    here, it is looked for in the folders above the adapter, of which that one is usually the repository's root.
    """
    if Path(base).is_dir() or Path(base).is_absolute() or not _looks_local(base):
        return base
    places = (above / base for above in folder.resolve().parents)
    return next((str(place) for place in places if (place / "config.json").is_file()), base)


def _cached_adapter(name: str, revision: str | None) -> Path | None:
    """The folder of an adapter's repository in the hub's cache; None for any other name. Nothing is fetched."""
    if not name or _looks_local(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        place = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError:
        return None  # no id of the hub: who loads the model says so
    return Path(place).parent if isinstance(place, str) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_object(folder / CONFIG)
    except ValueError as error:
        raise ModelError(
            f"{folder / CONFIG} cannot be read: {error}", way_out="copy or fetch the adapter again"
        ) from None
    check_config(folder / CONFIG, config)
    return config


def object_in(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        return read_object(file)
    except ValueError:
        return {}


def check_finished(folder: Path, where: str = "") -> None:
    """Raise ModelError for a run folder whose result is not there yet, or was found wrong."""
    if (folder / MANIFEST).is_file() and (found := status(folder)) != "finished":
        raise ModelError(
            f"{folder} holds the result of no finished run: {MANIFEST} says {found}",
            where=where,
            why="what lies there may be half of a result, or one that was found wrong",
            way_out="the same sft.py command again goes on with that run",
        )


def _check_base(start: Start) -> None:
    """Raise ModelError unless the adapter's base is a model by itself."""
    place = str((start.adapter or Path()) / CONFIG)
    check_source(start.base, place)
    check_finished(Path(start.base), place)
    if of(start.base, start.revision).adapter:
        raise ModelError(
            f"the base of {start.adapter} is an adapter too: {start.base}",
            where=place,
            why="one adapter on one base is trained on",
            way_out=f"{_merge(start.base)}, then name merged/{Path(start.base).name} as the base there",
        )


def merge_command(adapter: str | Path, recipe: dict[str, Any], output_dir: str = "") -> str:
    """What to type to fold an adapter into its base, as it was trained by a recipe (empty where it is not known)."""
    words = ["--adapter", str(adapter), "--output_dir", output_dir or f"merged/{Path(adapter).name}"]
    words += ["--quantized_base", "dequantized"] if recipe.get("load_in_4bit") else []  # the weights that it saw
    return f"python scripts/merge.py {quoted(*words)}"


def _merge(name: str) -> str:
    adapter = name if Path(name).is_dir() else of(name).adapter or name  # one of the hub lies in its cache
    recipe = object_in(Path(adapter) / MANIFEST).get("recipe")
    return merge_command(adapter, recipe if isinstance(recipe, dict) else {}, f"merged/{Path(name).name}")


def _instead(name: str) -> str:
    """The way out where an adapter cannot be trained on: its merged model can."""
    return f"{_merge(name)}, then --{KEY} merged/{Path(name).name}"


def _not_whole(recipe: Recipe, name: str) -> RecipeError:
    said = "use_peft: false" if "use_peft" in recipe.values else "use_peft is not set"
    return RecipeError(
        f"{said}, and {name} is an adapter",
        where=recipe.where("use_peft" if "use_peft" in recipe.values else KEY),
        why="full fine-tuning trains whole weights, and an adapter is a change of its base's",
        way_out=f"use_peft: true trains the adapter on; for full fine-tuning merge it first:\n{_instead(name)}",
    )


def _check_kind(start: Start, name: str) -> None:
    """Raise ModelError for what an adapter is or does that cannot be trained on."""
    config, place = start.config, str((start.adapter or Path()) / CONFIG)
    kind, task = config.get("peft_type"), config.get("task_type")
    what, way_out = "", _instead(name)
    if kind != "LORA":
        what = f"the adapter is {kind}, and only LoRA (with DoRA and rsLoRA) is trained on"
        if "PROMPT" in str(kind) or "PREFIX" in str(kind) or kind == "P_TUNING":  # no change of weights
            way_out = f"{KEY}: {start.base}, and train it anew"
    elif task not in ("CAUSAL_LM", None):
        what = f"the adapter is for {task}, and causal language models are trained"
        way_out = "an adapter of task_type CAUSAL_LM"
    elif config.get("bias", "none") != "none":
        what = f"bias: {config['bias']}: the adapter has trained the base's own biases, which is not trained on"
    elif str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        what = f"init_lora_weights: {config['init_lora_weights']}: the adapter began by changing the base's own weights"
    else:
        rest = config.keys() - {*FIELDS.values(), *KEPT, *LABELS}
        if used := sorted(key for key in rest if config[key]):
            what = f"the adapter has {used[0]}: {json.dumps(config[used[0]])[:80]}, which is not trained on"
    if what:
        raise ModelError(what, where=place, way_out=way_out)


def _check_tensors(start: Start, name: str) -> None:
    """Raise ModelError for weights of an adapter that its training on would leave out."""
    folder, whole = start.adapter or Path(), tuple(map(str, start.config.get("modules_to_save") or ()))
    tensors = Weights(folder, single=ADAPTER).tensors
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key and tensor.shape]
    rank = start.config.get("r")
    if isinstance(rank, int) and ranks and not start.config.get("rank_pattern") and rank > max(ranks):
        raise ModelError(
            f"the adapter's matrices have rank {max(ranks)}, and its configuration says r: {rank}",
            where=str(folder / CONFIG),
            way_out="copy or fetch the adapter again",
        )
    names = [key for key in tensors if ".lora_" not in key]
    others = sorted(key for key in names if not key.rpartition(".")[0].endswith(whole))  # PEFT's own rule
    if others:
        raise ModelError(
            f"the adapter holds weights of the base itself: {others[0]}{more(others)}",
            where=str(folder / ADAPTER),
            why="embeddings of added tokens, perhaps: they would not be trained on",
            way_out=_instead(name),
        )


def _values(start: Start, name: str) -> dict[str, Any]:
    """The adapter's values by the recipe's keys; what PEFT leaves at its default is left out.

    Raises:
        ModelError: a value is of another kind than its key takes.
    """
    found: dict[str, Any] = {}
    for key, its in FIELDS.items():
        value = start.config.get(its)
        if key == "lora_target_modules" and isinstance(value, str):
            value = [value]  # a regular expression, or all-linear
        if isinstance(value, list):
            value = sorted(value, key=str)
        if isinstance(value, float) and value.is_integer() and key != OF_THE_TRAINING:
            value = int(value)
        if value is None or (value is False and known_keys()[key].default is False):
            continue
        right = _is_right(key, value)
        if not right:
            raise ModelError(
                f"{its}: {json.dumps(value)[:80]} is no value of {key}",
                where=str((start.adapter or Path()) / CONFIG),
                way_out=_instead(name),
            )
        found[key] = value
    if "lora_r" not in found or "lora_alpha" not in found:
        raise ModelError(
            "the adapter has no rank (r) or no lora_alpha",
            where=str((start.adapter or Path()) / CONFIG),
            way_out="copy or fetch the adapter again",
        )
    return found


def _is_right(key: str, value: Any) -> bool:
    if key == OF_THE_TRAINING:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    if key in ("lora_r", "lora_alpha"):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if key in ("use_dora", "use_rslora"):
        return isinstance(value, bool)
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _contradictions(recipe: Recipe, start: Start, values: dict[str, Any]) -> Iterator[RecipeError]:
    """Keys that were set and say something else than the adapter."""
    name, keys = recipe.get(KEY), recipe.values
    for key in FIELDS:
        asked, has = recipe.get(key), values.get(key, known_keys()[key].default)
        if key in keys and key != OF_THE_TRAINING and not _agree(key, asked, has):
            yield RecipeError(
                f"{key}: {_shown(asked)}, and the adapter in {name} has {_shown(has)}",
                where=recipe.where(key),
                why="an adapter that is trained on keeps its form",
                way_out=f"{f'{key}: {_shown(has)}' if has else f'remove {key}'}; "
                f"or for a new adapter on top of this one:\n{_instead(name)}",
            )
    if recipe.get("peft_type") != "lora":
        yield RecipeError(
            f"peft_type: {recipe.get('peft_type')}, and the adapter in {name} is LoRA",
            where=recipe.where("peft_type"),
            way_out="remove peft_type",
        )
    revision = start.revision or known_keys()["model_revision"].default
    if "model_revision" in keys and Path(name).is_dir() and keys["model_revision"] != revision:
        yield RecipeError(
            f"model_revision: {keys['model_revision']}, and the adapter in {name} is on {start.base} at {revision}",
            where=recipe.where("model_revision"),
            way_out="remove model_revision",
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


def _notes(recipe: Recipe, start: Start) -> Iterator[str]:
    """What holds without a key for it, and what differs from the adapter's own training."""
    if kept := [f"{key}: {json.dumps(start.config[key])}" for key in KEPT if start.config.get(key)]:
        yield f"{recipe.get(KEY)} keeps its {', '.join(kept)}"
    before = object_in((start.adapter or Path()) / MANIFEST).get("recipe")
    if isinstance(before, dict):
        was, now = bool(before.get("load_in_4bit")), bool(recipe.get("load_in_4bit"))
        if was != now:
            bits = ("the base's own weights", "a base in 4 bits")
            yield f"{recipe.get(KEY)} was trained on {bits[was]}, and trains on with {bits[now]}"
