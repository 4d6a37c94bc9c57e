"""The keys inside the blocks that TRL and Transformers take as plain dictionaries.

What they would swallow, or raise over an hour into the queue, is known beforehand here: the names
are read off the functions and dataclasses that the blocks are handed to. Called by
`schema.introspect()` alone, since everything here imports the libraries.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

from stepladder.recipe.schema import Key, keys_of, types_of

ANY = ("bool", "dict", "float", "int", "list", "none", "str")

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
        found[name] = Key(name, "from_pretrained", ANY, None)
    # Other names change the model's configuration; Llama's are those that most models share. A name that
    # the model's own configuration lacks is an error of from_pretrained, so none of them is silent.
    every_model = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    for item in dataclasses.fields(LlamaConfig):
        if item.name not in every_model | NOT_IN_A_RECIPE:
            found.setdefault(item.name, Key(item.name, "LlamaConfig", ANY, None))
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
        known = tuple(sorted(types)) if types - {"none"} else ANY
        keys[name] = Key(name, function.__name__, known, default, choices=choices)
    return keys
