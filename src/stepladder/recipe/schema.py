"""Every key that a recipe may hold: those of the installed TRL and Transformers, and our own few.

TRL and Transformers take seconds to import, and a wrong key should be reported at once, so
what they know is read from their dataclasses once and kept in a cache file that is named
after their versions.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepladder import console, files


@dataclass
class StepladderArguments:
    """The keys that Stepladder adds to TRL's and Transformers' own."""

    extends: str | None = field(
        default=None, metadata={"help": "Another recipe that this one starts from, relative to this file."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per optimizer step over all ranks. Gradient accumulation follows from it, the "
            "micro-batch (`per_device_train_batch_size`) and the number of ranks, so that the loss curve is the "
            "same on any number of them."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data file or hub id to evaluate on, where it is not a split of the training set."},
    )
    column_map: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Names for a data file's columns: {input: frage, output: antwort} reads `frage` as `input`."},
    )
    role_map: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Roles for a conversation's own names: {bot: assistant, customer: user}."},
    )
    mix_general: float = field(
        default=0.0,
        metadata={"help": "Share of general-knowledge rows mixed in against forgetting; 0.1 to 0.2 is usual."},
    )
    on_bad_row: str = field(
        default="stop",
        metadata={
            "help": "What a row that cannot be used does: stop the run, or be skipped, counted and listed.",
            "choices": ["stop", "skip"],
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A template for a model that has none: chatml, the name of one that TRL ships (llama3, gemma, "
            "phi3 …), or a Jinja template as text."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "For base models: the text before the answer, such as '### User: {input}\\n### Assistant: '."
        },
    )
    peft_type: str = field(
        default="lora",
        metadata={
            "help": "With use_peft, what is trained: low-rank matrices beside the weights, or virtual tokens before "
            "every prompt, by their keys and values in each layer (prefix) or their embeddings (prompt).",
            "choices": ["lora", "prefix", "prompt"],
        },
    )
    num_virtual_tokens: int = field(default=20, metadata={"help": "How many tokens prefix or prompt tuning learns."})
    virtual_tokens_text: str = field(
        default="You are a helpful assistant. Answer the user's question in the style of the examples.",
        metadata={"help": "What the virtual tokens begin as, cut or repeated to their number."},
    )
    on_nan: str = field(
        default="stop",
        metadata={
            "help": "What a loss or gradient that is no finite number does: stop the run, or leave the step out (at "
            "most 10 times).",
            "choices": ["stop", "skip"],
        },
    )
    hang_timeout: float = field(
        default=1200.0,
        metadata={"help": "Seconds without any progress after which a run ends and says where each rank stands."},
    )
    wandb_entity: str | None = field(
        default=None, metadata={"help": "The W&B user or team that the run belongs to; the project is `project`."}
    )
    wandb_run_group: str | None = field(default=None, metadata={"help": "The group of the run in W&B."})
    wandb_tags: list[str] | None = field(default=None, metadata={"help": "Tags of the run in W&B."})
    wandb_log_model: bool = field(
        default=False, metadata={"help": "Whether the adapter or model is kept in W&B too, as an artifact of the run."}
    )
    train_on: str = field(
        default="all_turns",
        metadata={
            "help": "Which tokens are trained: the assistant's in every turn, in the last one, or all tokens.",
            "choices": ["all_turns", "last_turn", "everything"],
        },
    )


@dataclass
class DatasetEntryArguments:
    """What Stepladder adds to each entry of TRL's `datasets`."""

    column_map: dict[str, str] | None = field(default=None, metadata={"help": "As the recipe's own, for this set."})
    role_map: dict[str, str] | None = field(default=None, metadata={"help": "As the recipe's own, for this set."})
    weight: float | None = field(default=None, metadata={"help": "This set's share relative to the others'."})
    rows: float | None = field(
        default=None, metadata={"help": "How many of its rows are taken; below 1: which share of them."}
    )


# Keys whose `auto` the plan answers: how a step is cut and what it keeps, but not what it computes.
BY_PLAN = ("per_device_train_batch_size", "gradient_checkpointing")
# Our own meaning for keys that TRL or Transformers know: `auto` where they have only a value.
AUTO_KEYS = {"bf16", "padding_free", *BY_PLAN}
DEFAULTS = {"attn_implementation": "auto"}  # in place of the libraries'; it is one of their names, or auto
# Fields of TRL's dataclasses that a recipe does not set: the launcher or the script does.
NOT_FOR_RECIPES = {"local_rank", "do_train", "do_eval", "do_predict"}


# The values that the libraries allow without saying so in a type.
CHOICES = {
    "debug": ("underflow_overflow",),  # the other is for TPUs, and ends a run anywhere else
    "bnb_4bit_quant_storage": ("uint8", "float16", "bfloat16", "float32"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe, or of a block inside it.

    `owner` is the class or function that takes it. `types` names what a value may be (`int`,
    `float`, `bool`, `str`, `list`, `dict`, `none`), `items` the same for the elements of a list
    and the values of a free-form block; `nested` are the keys of a block, or of each block in a list.
    """

    name: str
    owner: str
    types: tuple[str, ...]
    default: Any
    choices: tuple[str, ...] = ()
    help: str = ""
    nested: tuple[Key, ...] = ()
    items: tuple[str, ...] = ()
    required: bool = False


Schema = dict[str, Key]


def versions() -> dict[str, str]:
    """The installed libraries that decide which keys exist."""
    return {name: importlib.metadata.version(name) for name in ("trl", "transformers", "accelerate", "torch")}


@functools.cache
def known_keys() -> Schema:
    """All keys by name, from the cache where it is of the installed versions."""
    # The code that looks counts as a version: a change of it must not meet an old cache.
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("schema.py", "blocks.py")]
    stamp = hashlib.sha256(json.dumps([versions(), sys.version_info[:2], code]).encode()).hexdigest()[:16]
    root = files.cache_folder()
    file = root / f"keys-{stamp}.json"
    try:
        return {item["name"]: _key_from_json(item) for item in json.loads(file.read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    schema = introspect()
    try:  # several ranks may write at once: each its own file, and the rename is atomic
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=root, delete=False) as out:
            json.dump([dataclasses.asdict(key) for key in schema.values()], out)
        os.replace(out.name, file)
    except OSError:
        pass  # a read-only home only costs the next start a few seconds
    return schema


def introspect() -> Schema:
    """Read the keys from the dataclasses themselves (imports TRL and Transformers: seconds)."""
    console.quiet_libraries()
    from trl import ModelConfig, SFTConfig
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

    from stepladder.recipe import blocks

    nested, choices = blocks.block_keys(), CHOICES | {"report_to": blocks.tracker_names()}
    schema: Schema = {}
    # Later owners win: our own meaning of a key stands before TRL's.
    for owner in (SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig, StepladderArguments):
        for key in keys_of(owner):
            if key.name not in NOT_FOR_RECIPES:
                schema[key.name] = dataclasses.replace(
                    key,
                    # not the path of a JSON file: its keys would be checked by nobody
                    types=tuple(kind for kind in key.types if kind != "str" or key.name not in nested),
                    nested=nested.get(key.name, key.nested),
                    choices=choices.get(key.name, key.choices),
                )
    return schema


def keys_of(owner: type) -> list[Key]:
    """The fields of a dataclass as keys."""
    hints = typing.get_type_hints(owner)
    docs = _documented(owner)
    keys = []
    for item in dataclasses.fields(owner):
        hint = hints[item.name]
        types, choices, items = types_of(hint)
        choices = tuple(str(c) for c in item.metadata.get("choices") or ()) or choices
        default, factory = item.default, item.default_factory
        required = default is dataclasses.MISSING and factory is dataclasses.MISSING
        if default is dataclasses.MISSING:
            default = factory() if factory is not dataclasses.MISSING else None
        if item.name in AUTO_KEYS:
            types, choices = types | {"str"}, ("auto",)
            default = default if item.name in BY_PLAN else "auto"
        default = DEFAULTS.get(item.name, default)
        keys.append(
            Key(
                name=item.name,
                owner=owner.__name__,
                types=tuple(sorted(types)),
                default=default.value if isinstance(default, enum.Enum) else default,
                choices=choices,
                help=str(item.metadata.get("help") or docs.get(item.name, "")),
                nested=_nested(hint),
                items=tuple(sorted(items)),
                required=required,
            )
        )
    return keys


def types_of(hint: Any) -> tuple[set[str], tuple[str, ...], set[str]]:
    """Plain type names; the values that a string may have (enumerations, literals); the types of elements."""
    types: set[str] = set()
    choices: tuple[str, ...] = ()
    items: set[str] = set()
    for part in typing.get_args(hint) if _is_union(hint) else (hint,):
        origin = typing.get_origin(part) or part
        if isinstance(origin, type) and issubclass(origin, enum.Enum):
            types.add("str")
            choices = tuple(str(member.value) for member in origin)
        elif origin is typing.Literal:
            values = typing.get_args(part)
            types |= {type(value).__name__ for value in values}
            choices = tuple(value for value in values if isinstance(value, str))
        elif origin is type(None):
            types.add("none")
        elif origin in (int, float, bool, str, list, dict):
            types.add(origin.__name__)
            if origin in (list, dict) and typing.get_args(part):
                element, choices_of_elements, _ = types_of(typing.get_args(part)[-1])
                items, choices = items | element, choices_of_elements or choices
        elif dataclasses.is_dataclass(origin):
            types.add("dict")
    return types, choices, items


def _nested(hint: Any) -> tuple[Key, ...]:
    """The keys of a list of dataclasses: the entries of `datasets`."""
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint) or (None,)
        if dataclasses.is_dataclass(item):
            return (*keys_of(item), *keys_of(DatasetEntryArguments))  # type: ignore[arg-type]
    return ()


def _is_union(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return origin is typing.Union or getattr(origin, "__name__", "") == "UnionType"


def _documented(owner: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field, in one line each."""
    docs: dict[str, str] = {}
    for cls in reversed(owner.__mro__):
        for match in re.finditer(
            r"^ {8}(\w+) \([^\n]*\):\n((?: {12}[^\n]*\n?|\n)+)", cls.__doc__ or "", flags=re.MULTILINE
        ):
            docs[match[1]] = " ".join(match[2].split())
    return docs


def _key_from_json(item: dict[str, Any]) -> Key:
    nested = tuple(_key_from_json(key) for key in item["nested"])
    lists = {name: tuple(item[name]) for name in ("types", "choices", "items")}
    return Key(**{**item, **lists, "nested": nested})
