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
    chat_template: str | None = None
    prompt_template: str | None = None
    train_on: str = "all_turns"


# Our own meaning for keys that TRL or Transformers know: `auto` where they have only a value.
AUTO_KEYS = {"bf16"}
# Fields of TRL's dataclasses that a recipe does not set: the launcher or the script does.
NOT_FOR_RECIPES = {"local_rank", "do_train", "do_eval", "do_predict"}


@dataclass(frozen=True)
class Key:
    """One key: `types` names what a value may be (`int`, `float`, `bool`, `str`, `list`, `dict`, `none`)."""

    name: str
    owner: str
    types: tuple[str, ...]
    default: Any
    choices: tuple[str, ...] = ()
    help: str = ""
    nested: tuple[Key, ...] = ()


Schema = dict[str, Key]


def versions() -> dict[str, str]:
    """The installed libraries that decide which keys exist."""
    return {name: importlib.metadata.version(name) for name in ("trl", "transformers")}


@functools.cache
def known_keys() -> Schema:
    """All keys by name, from the cache where it is of the installed versions."""
    # The content of this file counts as a version: a change of it must not meet an old cache.
    stamp = hashlib.sha256(
        json.dumps([versions(), sys.version_info[:2], Path(__file__).read_text()]).encode()
    ).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder"
    cache = root / f"keys-{stamp}.json"
    try:
        return {item["name"]: _key_from_json(item) for item in json.loads(cache.read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    schema = introspect()
    try:  # several ranks may write at once: each its own file, and the rename is atomic
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=root, delete=False) as out:
            json.dump([dataclasses.asdict(key) for key in schema.values()], out)
        os.replace(out.name, cache)
    except OSError:
        pass  # a read-only home only costs the next start a few seconds
    return schema


def introspect() -> Schema:
    """Read the keys from the dataclasses themselves (imports TRL and Transformers: seconds)."""
    from trl import ModelConfig, SFTConfig
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

    schema: Schema = {}
    # Later owners win: our own meaning of a key stands before TRL's.
    for owner in (SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig, StepladderArguments):
        for key in _keys_of(owner):
            if key.name not in NOT_FOR_RECIPES:
                schema[key.name] = key
    return schema


def _keys_of(owner: type) -> list[Key]:
    hints = typing.get_type_hints(owner)
    docs = _documented(owner)
    keys = []
    for item in dataclasses.fields(owner):
        hint = hints[item.name]
        types, choices = _types_and_choices(hint)
        choices = tuple(str(c) for c in item.metadata.get("choices") or ()) or choices
        default = item.default
        if default is dataclasses.MISSING:
            factory = item.default_factory
            default = factory() if factory is not dataclasses.MISSING else None
        if item.name in AUTO_KEYS:
            types, choices, default = {"bool", "str"}, ("auto",), "auto"
        keys.append(
            Key(
                name=item.name,
                owner=owner.__name__,
                types=tuple(sorted(types)),
                default=default.value if isinstance(default, enum.Enum) else default,
                choices=choices,
                help=str(item.metadata.get("help") or docs.get(item.name, "")),
                nested=_nested(hint),
            )
        )
    return keys


def _types_and_choices(hint: Any) -> tuple[set[str], tuple[str, ...]]:
    """Plain type names and, for enumerations and literals, the values that a string may have."""
    types: set[str] = set()
    choices: tuple[str, ...] = ()
    for part in typing.get_args(hint) if _is_union(hint) else (hint,):
        origin = typing.get_origin(part) or part
        if isinstance(origin, type) and issubclass(origin, enum.Enum):
            types.add("str")
            choices = tuple(str(member.value) for member in origin)
        elif origin is typing.Literal:
            values = typing.get_args(part)
            types |= {type(value).__name__ for value in values}
        elif origin is type(None):
            types.add("none")
        elif origin in (int, float, bool, str, list, dict):
            types.add(origin.__name__)
        elif dataclasses.is_dataclass(origin):
            types.add("dict")
    return types, choices


def _nested(hint: Any) -> tuple[Key, ...]:
    """The keys of a list of dataclasses: the entries of `datasets`."""
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint) or (None,)
        if dataclasses.is_dataclass(item):
            return tuple(_keys_of(item))  # type: ignore[arg-type]
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
    return Key(
        **{
            **item,
            "types": tuple(item["types"]),
            "choices": tuple(item["choices"]),
            "nested": tuple(_key_from_json(nested) for nested in item["nested"]),
        }
    )
