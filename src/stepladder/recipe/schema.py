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
import importlib.resources
import inspect
import json
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import console, files

ANYTHING = ("bool", "dict", "float", "int", "list", "none", "str")
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

# Parameters that every schedule gets from the Trainer.
FROM_THE_TRAINER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
# Parameters of from_pretrained that a recipe cannot write, or that would load something else than the recipe's model.
NOT_IN_A_RECIPE = {
    *("self", "cls", "pretrained_model_name_or_path", "model_args", "kwargs", "config", "state_dict", "tqdm_class"),
    *("output_loading_info", "generation_config", "distributed_config", "device_mesh", "tp_plan", "tp_size"),
    *("fusion_config", "gguf_file", "weights_only", "adapter_kwargs", "adapter_name", "token"),
    # The Trainer sets these again, from its own arguments and from the tokenizer.
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
}
# Known to from_pretrained without a trace in its signature or its body.
ALSO_FROM_PRETRAINED = {"attn_implementation", "experts_implementation", "load_in_4bit", "load_in_8bit"}


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
    return {name: importlib.metadata.version(name) for name in ("trl", "transformers", "peft", "accelerate", "torch")}


@functools.cache
def known_keys() -> Schema:
    """All keys by name, from the cache where it is of the installed versions."""
    # The code that looks counts as a version: a change of it must not meet an old cache.
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("schema.py", "keys.yaml")]
    stamp = hashlib.sha256(json.dumps([versions(), sys.version_info[:2], code]).encode()).hexdigest()[:16]
    root = files.cache_folder()
    file = root / f"keys-{stamp}.json"
    try:
        return {item["name"]: _key_from_json(item) for item in json.loads(file.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    schema = introspect()
    try:  # several ranks may write at once: each its own file, and the rename is atomic
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=root, delete=False) as out:
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

    nested, choices = block_keys(), CHOICES | {"report_to": tracker_names()}
    libraries = [
        key for owner in (SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig) for key in keys_of(owner)
    ]
    schema: Schema = {}
    # Later keys win: our own meaning of a key stands before TRL's.
    for key in (*libraries, *own_keys("recipe")):
        if key.name not in NOT_FOR_RECIPES:
            schema[key.name] = dataclasses.replace(
                key,
                # not the path of a JSON file: its keys would be checked by nobody
                types=tuple(kind for kind in key.types if kind != "str" or key.name not in nested),
                nested=nested.get(key.name, key.nested),
                choices=choices.get(key.name, key.choices),
            )
    return schema


def own_keys(block: str) -> tuple[Key, ...]:
    """Stepladder's own keys at the top of a recipe ("recipe") or in each entry of `datasets` ("datasets")."""
    rows = files.read_table("recipe/keys.yaml")[block]
    return tuple(
        _key_from_json({"name": name, "owner": "Stepladder", "default": None, **row}) for name, row in rows.items()
    )


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
            return (*keys_of(item), *own_keys("datasets"))  # type: ignore[arg-type]
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
    nested = tuple(_key_from_json(key) for key in item.get("nested", ()))
    lists = {name: tuple(item.get(name, ())) for name in ("types", "choices", "items")}
    return Key(**{**item, **lists, "nested": nested})


# ---- the keys inside the blocks that TRL and Transformers take as plain dictionaries ----
#
# The libraries would swallow a wrong one, or raise over an hour into the queue. The names are read off the functions
# and dataclasses that the blocks are handed to.


def block_keys() -> dict[str, tuple[Key, ...]]:
    """The known keys of each block, by the block's own name."""
    checkpointing = _checkpointing()
    return {
        "accelerator_config": _accelerator(),
        "activation_checkpointing_kwargs": checkpointing,
        "gradient_checkpointing_kwargs": checkpointing,
        "liger_kernel_config": _liger(),
        "lr_scheduler_kwargs": _schedules(),
        "model_init_kwargs": _model_init(),
        "peft_kwargs": _peft(),
    }


def tracker_names() -> tuple[str, ...]:
    """What `report_to` may name."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return ("none", "all", *INTEGRATION_TO_CALLBACK)


def _accelerator() -> tuple[Key, ...]:
    from accelerate.utils import GradientAccumulationPlugin
    from transformers.trainer_pt_utils import AcceleratorConfig

    accumulation = tuple(keys_of(GradientAccumulationPlugin))
    return tuple(
        Key(key.name, key.owner, key.types, key.default, nested=accumulation)
        if key.name == "gradient_accumulation_kwargs"
        else key
        for key in keys_of(AcceleratorConfig)
    )


def _checkpointing() -> tuple[Key, ...]:
    from torch.utils.checkpoint import CheckpointFunction, checkpoint
    from transformers import PreTrainedModel

    found = _parameters(checkpoint, skip={"function", "args", "kwargs", "context_fn"})
    skip = {"self", "activation_checkpointing_kwargs"}
    found |= _parameters(PreTrainedModel.activation_checkpointing_enable, skip=skip)
    # torch pops this one from **kwargs, and TRL takes `selective` for itself: neither is in a signature.
    flags = ("preserve_rng_state", "selective")
    assert "preserve_rng_state" in inspect.getsource(checkpoint) + inspect.getsource(CheckpointFunction)
    return (*found.values(), *(Key(name, "checkpoint", ("bool",), None) for name in flags))


def _liger() -> tuple[Key, ...]:
    """Liger drops names that it does not know; Transformers' documentation lists those that it does."""
    from transformers import TrainingArguments

    documented = re.search(r"liger_kernel_config \(.*?If `None`", TrainingArguments.__doc__ or "", flags=re.DOTALL)
    names = re.findall(r'"(\w+)"', documented[0] if documented else "")
    return tuple(Key(name, "Liger", ("bool",), None) for name in dict.fromkeys([*names, "geglu", "layer_norm"]))


def _schedules() -> tuple[Key, ...]:
    """Every parameter of every schedule; its owner lists the schedules that take it."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    behind = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}  # their functions take **kwargs
    found: dict[str, Key] = {}
    for schedule, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        name = str(schedule.value)
        for key in _parameters(behind.get(name, function), skip=FROM_THE_TRAINER).values():
            known = found.get(key.name)
            owner, types = (f"{known.owner} {name}", {*known.types, *key.types}) if known else (name, key.types)
            found[key.name] = Key(key.name, owner, tuple(sorted(types)), None)
    return tuple(found.values())


def _model_init() -> tuple[Key, ...]:
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

    found = _parameters(PreTrainedModel.from_pretrained, skip=NOT_IN_A_RECIPE)
    bodies = [inspect.getsource(cls.from_pretrained) for cls in (PreTrainedModel, AutoModelForCausalLM)]
    popped = {name for body in bodies for name in re.findall(r"= .*kwargs\.pop\(\"([a-z]\w*)\"", body)}
    for name in sorted((popped | ALSO_FROM_PRETRAINED) - NOT_IN_A_RECIPE - found.keys()):
        found[name] = Key(name, "from_pretrained", ANYTHING, None)
    # Other names change the model's configuration; Llama's are those that most models share. A name that
    # the model's own configuration lacks is an error of from_pretrained, so none of them is silent.
    every_model = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    for item in dataclasses.fields(LlamaConfig):
        if item.name not in every_model | NOT_IN_A_RECIPE:
            found.setdefault(item.name, Key(item.name, "LlamaConfig", ANYTHING, None))
    return tuple(found.values())


def _peft() -> tuple[Key, ...]:
    """Every field of PEFT's configuration of each method; its owner lists the methods that take it."""
    from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig

    found: dict[str, Key] = {}
    methods = {"lora": LoraConfig, "ia3": IA3Config, "vera": VeraConfig, "oft": OFTConfig}
    for method, config in methods.items():
        for key in keys_of(config):
            owner = f"{found[key.name].owner} {method}" if key.name in found else method
            # `pissa_niter_[number of iters]` is no value: rules.py knows those of init_lora_weights
            choices = () if key.name == "init_lora_weights" else key.choices
            found[key.name] = dataclasses.replace(key, owner=owner, choices=choices, help="")
    del found["runtime_config"]  # which PEFT does not save
    return tuple(found.values())


def _parameters(function: Callable[..., Any], skip: set[str]) -> dict[str, Key]:
    """The parameters of a function as keys: typed by their annotation, else by their default."""
    try:
        hints = typing.get_type_hints(function if inspect.isfunction(function) else function.__init__)
    except (NameError, TypeError):
        hints = {}
    keys = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        types, choices, _ = types_of(hints.get(name, type(default)))
        known = tuple(sorted(types)) if types - {"none"} else ANYTHING
        keys[name] = Key(name, function.__name__, known, default, choices=choices)
    return keys
