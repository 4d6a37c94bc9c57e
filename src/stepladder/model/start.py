"""What training starts from: a model, or an adapter on its base that is trained on, with its configuration.

Files and JSON only: torch is not imported, so that a wrong start is reported at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepladder import files, installation
from stepladder.console import quote_for_shell
from stepladder.data import templates
from stepladder.errors import ModelError
from stepladder.files import read_object
from stepladder.manifest import MANIFEST, status
from stepladder.settings import Settings

CHECKPOINT, MERGE = "COMPLETE.json", "merge.json"  # what tells a checkpoint, and a merged model, from other folders
MODEL_KEY = "model_name_or_path"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# These begin by changing the base's weights (PiSSA keeps what its factors leave over), so that PEFT must see the whole
# model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva", "mica")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


def _are_rows(value: Any) -> bool:
    """Whether a value is PEFT's `trainable_token_indices`: row numbers, or row numbers by module."""
    lists = list(value.values()) if isinstance(value, dict) else [value or []]
    return all(isinstance(each, list) and all(type(row) is int and row >= 0 for row in each) for each in lists)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


# What LoRA's fields may hold. PEFT checks none of them, and takes the text "false" for true.
FIELD_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), _is_number),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), lambda value: isinstance(value, bool | None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _are_numbers),
    **dict.fromkeys(("target_modules", "exclude_modules"), lambda value: isinstance(value, str) or _are_names(value)),
    "modules_to_save": _are_names,
    "trainable_token_indices": _are_rows,
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
    def config_file(self) -> str:
        """Where the adapter's configuration lies."""
        return str((self.adapter or Path()) / ADAPTER_CONFIG)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter, with the chat template that it was trained by."""
        return self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        ModelError: it cannot be read, or a value is of another kind than its field.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = read_object(file)
    except ValueError as error:
        raise ModelError(f"{file} cannot be read: {error}", help="copy or fetch the adapter again") from None
    checks = {"peft_type": lambda value: isinstance(value, str)}
    for key, is_right in (checks | FIELD_CHECKS if config.get("peft_type") == "LORA" else checks).items():
        if key in config and not is_right(config[key]):
            raise invalid_config(file, f"{key} cannot be {json.dumps(config[key])[:80]}")
    return config


def trained_rows(config: dict[str, Any]) -> set[int]:
    """The rows of the input embeddings that an adapter trains, by its adapter_config.json."""
    indices = config.get("trainable_token_indices") or []
    by_module = list(indices.values()) if isinstance(indices, dict) else [indices]
    return set.intersection(*map(set, by_module)) if by_module else set()


def invalid_config(file: Path, what: str) -> ModelError:
    return ModelError(f"{file} cannot be used: {what}", help="copy or fetch the adapter again")


def resolve_model(name: str, revision: str | None = None) -> Start:
    """The model or adapter of a name: a folder, or a hub id; of a repository that is not in the cache, a model.

    Raises:
        ModelError: an adapter_config.json that cannot be read, or that names no base model.
    """
    folder = Path(name) if Path(name).is_dir() else _cached_adapter(name, revision)
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return Start(name, revision)
    config = read_config(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"the adapter in {folder} names no base model",
            where=str(folder / ADAPTER_CONFIG),
            help='write it there: "base_model_name_or_path": "a folder, or a hub id"',
        )
    revision = config.get("revision")
    return Start(_find_base(base, folder), revision if isinstance(revision, str) else None, folder, config)


def resolve_recipe_model(recipe: Settings) -> Start:
    """What the recipe's `model_name_or_path` stands for; raises as `resolve_model`."""
    return resolve_model(recipe.get(MODEL_KEY) or "", recipe.get("model_revision"))


def template_notes(recipe: Settings, own: Any, chosen: Any) -> list[str]:
    """That the recipe chooses another chat template than the one that lies beside the adapter.

    Args:
        own: the template of the tokenizer as it was loaded, and `chosen` the one that rows are rendered by.
    """
    if not own or own == chosen or not resolve_recipe_model(recipe).has_tokenizer:
        return []
    keys = [key for key in templates.TEMPLATE_KEYS if recipe.get(key)]
    return [
        f"{recipe.where(k)}: {k} is another template than the adapter was trained by, which lies beside it"
        for k in keys
    ]


def resolve_existing_model(name: str, base: str | None = None) -> Start:
    """The model or adapter of a name, to be used as it is: it is there, and so is an adapter's base.

    Args:
        base: where an adapter's base lies, in place of where the adapter says.

    Raises:
        ModelError: one of them is not there; `base` is given for a model that is none on another one.
    """
    check_source(name)
    start = resolve_model(name)
    if start.adapter is None:
        if base:
            raise ModelError(f"--base {base}: {name} is a model by itself, not an adapter", help="leave out --base")
        return start
    if base:
        check_source(base, "--base")
        return dataclasses.replace(start, base=base, revision=None)
    try:
        check_source(start.base)
    except ModelError as error:
        raise ModelError(
            f"the base of the adapter {name} cannot be used: {error.what}",
            where=start.config_file,
            why=error.why,
            help="--base with the folder or hub id where it is now",
        ) from None
    return start


def describe_start(recipe: Settings) -> dict[str, Any]:
    """For run.json: the base, and the adapter that training starts from with the run that made it."""
    start = resolve_recipe_model(recipe)
    if start.adapter is None:
        return {"base": start.base}
    facts: dict[str, Any] = {"base": start.base, "adapter": str(recipe.get(MODEL_KEY))}
    if before := read_if_readable(start.adapter / MANIFEST):
        facts |= {"recipe_hash": before.get("recipe_hash"), "step": before.get("result_step")}
    return facts


def check_source(name: str | None, where: str = "") -> None:
    """Raise ModelError unless `name` is a model folder with safetensors, an adapter, or can be a hub id.

    The files of a folder are looked at before a library opens them: a pipe would be waited for until the job ends.
    """
    if not name:
        raise ModelError("no model is named", where=where, help="model_name_or_path: a folder or a hub id")
    if fault := files.name_fault(name):
        raise ModelError(f"'{name[:60]}…' names no model: {fault}", where=where, help="a folder or a hub id")
    folder = Path(name)
    if not folder.is_dir():
        if _looks_local(name):
            fetch = installation.command("fetch_model") if "smollm2-135m-instruct" in name else "check the path"
            raise ModelError(f"there is no model at '{name}'", where=where, why=installation.places(name), help=fetch)
        return
    check_files(folder, where)
    if (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        if not list(folder.glob("*.safetensors")):
            raise ModelError(
                f"{folder} holds no safetensors file",
                where=where,
                why="weights are read from safetensors only: a pickled file can run code when it is opened",
                help="convert the weights to safetensors, or fetch the model again",
            )
        return
    if (folder / MANIFEST).is_file():
        raise ModelError(
            f"{folder} holds no model yet: the run has not finished",
            where=where,
            why=f"{MANIFEST} lies there, and no config.json",
            help=f"the same {installation.command('sft')} command again resumes it",
        )
    if (folder / CHECKPOINT).is_file():
        raise ModelError(
            f"{folder} is a checkpoint, which resumes its own run and is no model",
            where=where,
            why="it holds the trained weights and the optimizer's state, without a configuration or a tokenizer",
            help=f"the result of its run: {folder.parent}; or resume that run: --resume {folder}",
        )
    raise ModelError(f"{folder} is no model: it has no config.json", where=where, help="check the path")


def check_files(folder: Path, where: str = "") -> None:
    """Raise ModelError for a file of a folder that a library would wait for, or end in a traceback at."""
    try:
        if folder.is_dir():
            files.check_model_folder(folder)
    except ValueError as error:
        raise ModelError(str(error), where=where, help="fetch or copy the model again") from None


def _looks_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "models/", "runs/")) or name.count("/") > 1


def _find_base(base: str, folder: Path) -> str:
    """A base by the name that an adapter has for it.

    A relative path counts from where the training was started. Where it leads nowhere from here, it is looked for in
    the folders above the adapter.
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
        place = try_to_load_from_cache(name, ADAPTER_CONFIG, revision=revision)
    except HFValidationError:
        return None  # no id of the hub: who loads the model says so
    return Path(place).parent if isinstance(place, str) else None


def read_if_readable(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        return read_object(file)
    except ValueError:
        return {}


def check_finished(folder: Path, where: str = "") -> None:
    """Raise ModelError for a run folder whose result is not there yet, or was found wrong."""
    if (folder / MANIFEST).is_file() and (state := status(folder)) != "finished":
        raise ModelError(
            f"{folder} holds the result of no finished run: {MANIFEST} says {state}",
            where=where,
            why="what lies there may be half of a result, or one that was found wrong",
            help=f"the same {installation.command('sft')} command again resumes that run",
        )


def merge_command(adapter: str | Path, recipe: dict[str, Any], output_dir: str = "") -> str:
    """What to type to fold an adapter into its base, as it was trained by a recipe (empty where it is not known)."""
    words = ["--adapter", str(adapter), "--output_dir", output_dir or f"merged/{Path(adapter).name}"]
    words += ["--quantized_base", "dequantized"] if recipe.get("load_in_4bit") else []  # the weights that it saw
    return f"{installation.command('merge')} {quote_for_shell(*words)}"
