"""What the trainer is built from, by recipe and launch: TRL's SFTConfig, the step's layout, the user's callback.

And what a launch cannot train as one process does, which is refused, or noted where the run begins. ZeRO concatenates
all weights and cuts them into equal slices: an optimizer sees slices, not matrices. Figures are differences of losses
after 7 steps of the tiny model of tests/ (tests/test_train.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.data.special_tokens import NewToken
from stepladder.errors import LaunchError, RecipeError
from stepladder.model import start
from stepladder.recipe import convert
from stepladder.recipe.recipe import BY_METRIC, Recipe, StepLayout, split_batch, sums_sharded
from stepladder.recipe.schema import known_keys
from stepladder.settings import has_virtual_tokens
from stepladder.training.launch import native
from stepladder.training.launch.launcher import Launch, Strategy

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTConfig


# On a CPU these would end the run: TRL asks a GPU for its streams, and Liger's kernels are Triton's.
CALLBACK_HELP = "docs/prometheus.py is one"
GPU_ONLY = ("activation_offloading", "use_liger_kernel")
# Their update of a weight depends on that weight alone, so slices change nothing.
ELEMENTWISE = {
    *("adamw_torch", "adamw_torch_fused", "adamw_anyprecision", "ademamix", "sgd", "adagrad", "rmsprop"),
    *("lion_32bit", "paged_adamw_32bit", "paged_ademamix_32bit", "paged_lion_32bit", "rmsprop_bnb"),
    *("rmsprop_bnb_32bit", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
}
# Those that compute on FSDP's shards (DTensor); bitsandbytes' kernels, Adafactor and the rest need plain tensors.
ON_SHARDS = {
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("sgd", "adagrad", "rmsprop", "grokadamw", "stable_adamw"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
}
EMBEDDINGS = ("embed", "wte")  # in the names of input embeddings
OUTPUTS = ("lm_head", "embed_out")  # the last part of the names of output embeddings
# Part of their state is no plain tensor of `optimizer.state`: a projector, a dictionary of their own, or torchao's
# quantized tensors, which differ by a rounding once they were written as plain ones.
NOT_SAVED = ("galore", "apollo", "adalomo", "adamw_torch_4bit", "adamw_torch_8bit")


def check_streaming(recipe: Recipe) -> None:
    """Raise RecipeError for a stream, whose length is unknown, without `max_steps`."""
    for key in ("streaming", "dataset_streaming"):
        if recipe.get(key) and recipe.get("max_steps") < 1:
            raise RecipeError(
                f"{key} needs max_steps",
                where=recipe.where(key),
                why="how long an epoch is cannot be known before its end",
                help="max_steps: 1000, say",
            )


def check_stop(recipe: Recipe, step: int | None) -> None:
    """Raise RecipeError for a `--stop_at_step` that the run does not reach, or whose evaluation would change it."""
    where = "command line --stop_at_step"
    if step is None:
        return
    if 0 < recipe.get("max_steps") <= step:
        raise RecipeError(f"the run ends at max_steps {recipe.get('max_steps')}", where=where, help="a smaller step")
    if recipe.get("save_only_model"):
        raise RecipeError(
            "save_only_model: true writes no checkpoint that the run could go on from",
            where=recipe.where("save_only_model"),
            help="save_only_model: false",
        )
    every = recipe.get("eval_steps") or recipe.get("logging_steps")
    planned = recipe.get("eval_strategy") == "steps" and every >= 1 and step % every == 0
    planned &= step >= (recipe.get("eval_delay") or 0)
    key = "early_stopping_patience" if recipe.get("early_stopping_patience") else "load_best_model_at_end"
    key = "lr_scheduler_type" if recipe.get("lr_scheduler_type") in BY_METRIC else key
    if recipe.get("eval_strategy") != "no" and not planned and recipe.get(key):
        raise RecipeError(
            f"{key}: {recipe.get(key)} depends on each evaluation, and step {step} has none by eval_steps",
            where=where,
            why="the stop evaluates there, so that the run would differ from one that never stopped",
            help="eval_strategy: steps, and eval_steps of which it is a multiple",
        )


def check_strategy(recipe: Recipe, launch: Launch) -> list[str]:
    """Notes on what will differ from one process by more than rounding.

    Raises:
        RecipeError: the strategy cannot train or save the optimizer's state, the adapter or its embeddings.
    """
    native.check_system(recipe, launch)
    notes, optimizer, where = [], str(recipe.get("optim")), recipe.where("optim")
    if why := _unusable(optimizer, launch):
        others = {"zero3": optimizer in ELEMENTWISE, "fsdp": optimizer in ON_SHARDS, "ddp": True}
        instead = next(name for name, trains in others.items() if trains)
        raise RecipeError(
            f"optim: {optimizer} cannot run under {launch.strategy}",
            where=where,
            why=why,
            help="optim: adamw_torch_fused"
            + (f", or accelerate_configs/{instead}.yaml" if not optimizer.startswith((*NOT_SAVED, "lomo")) else ""),
        )
    kind = recipe.get("peft_type")
    if has_virtual_tokens(recipe) and launch.strategy.shards_weights:
        raise RecipeError(
            f"peft_type: {kind} cannot run under {launch.strategy}",
            where=recipe.where("peft_type"),
            why="PEFT runs the virtual tokens through their encoder as it saves, on one rank, which has a shard of it",
            help="accelerate_configs/ddp.yaml or zero2.yaml: the trained tensor is too small to shard",
        )
    if recipe.get("use_peft") and launch.strategy.is_fsdp and not sums_sharded(recipe):
        raise RecipeError(
            "sync_each_batch: false cannot run with an adapter under FSDP",
            where=recipe.where("accelerator_config"),
            why="torch 2.13 fails as it sums whole gradients of bf16 (`_unsharded_param`) where the head is not tied",
            help="leave it out: an adapter's gradients are small, so reducing them more often costs little",
        )
    if recipe.get("use_peft"):
        _check_whole_modules(recipe, launch)
    if recipe.get("fp8"):
        if launch.strategy.is_zero:
            raise RecipeError(
                f"fp8: true cannot run under {launch.strategy}",
                where=recipe.where("fp8"),
                why="torchao's layers are documented for DDP and FSDP only",
                help="accelerate_configs/fsdp.yaml",
            )
        notes.append(
            f"{recipe.where('fp8')}: fp8 scales each tensor of a micro-batch by its largest value, so losses depend "
            "on per_device_train_batch_size and the number of ranks; speed and losses were not measured on a GPU"
        )
    if recipe.get("load_in_8bit") and launch.ranks > 1:
        notes.append(
            f"{recipe.where('load_in_8bit')}: load_in_8bit finds outliers batch by batch, so evaluation "
            "losses depend on how the rows lie over the ranks (by about 2e-4); load_in_4bit does not"
        )
    return notes


def _unusable(optimizer: str, launch: Launch) -> str:
    """Why an optimizer cannot compute or be saved under a strategy; empty where it can."""
    if optimizer.startswith(NOT_SAVED):
        return "a checkpoint cannot hold the whole of its state, so an interrupted run could not resume"
    if optimizer == "lomo" and launch.ranks > 1:
        return "it updates the weights in the backward pass, before the ranks have averaged their gradients"
    if launch.strategy.is_fsdp and optimizer not in ON_SHARDS:
        return "FSDP gives an optimizer sharded tensors (DTensor), and this one computes on plain tensors only"
    if launch.strategy.is_zero and optimizer.endswith("8bit"):
        return "it quantizes its state in blocks, which ZeRO's slices cut: a checkpoint cannot hold them"
    if launch.strategy.is_zero and optimizer not in ELEMENTWISE:
        return (
            "it needs whole matrices and ZeRO gives an optimizer slices of all weights laid end to end: "
            "the curve would be another one (adafactor's by 5e-2 within 7 steps)"
        )
    return ""


def _check_whole_modules(recipe: Recipe, launch: Launch) -> None:
    """Raise RecipeError for embeddings beside an adapter (`lora_modules_to_save`) that a strategy cannot train or save.

    Whether its embeddings are tied is known only where the base is a folder.
    """
    whole = recipe.get("lora_modules_to_save") or []
    inputs = [name for name in whole if any(part in name for part in EMBEDDINGS)]
    why = ""
    if inputs and launch.strategy.is_zero and launch.strategy.shards_weights:
        why = "PEFT saves input embeddings on one rank, which has a shard of them: DeepSpeed ends there"
    elif launch.strategy.is_fsdp and (heads := [name for name in whole if name.rsplit(".", 1)[-1] in OUTPUTS]):
        inputs = heads
        why = "TRL's fused loss reads it outside of its forward pass: FSDP would not sum its gradients over the ranks"
    elif launch.strategy.is_fsdp and inputs:
        config = start.read_if_readable(Path(start.resolve_recipe_model(recipe).base) / "config.json")
        if config.get("tie_word_embeddings"):
            why = "FSDP shards a module by itself, and input and output embeddings are one tensor in this base"
    if why:
        raise RecipeError(
            f"lora_modules_to_save: {inputs[0]} cannot be trained under {launch.strategy}",
            where=recipe.where("lora_modules_to_save"),
            why=why,
            help="accelerate_configs/ddp.yaml or zero2.yaml",
        )


def check_new_tokens(recipe: Recipe, launch: Launch, new: Sequence[NewToken]) -> None:
    """Raise RecipeError where the strategy cannot train rows of the embeddings beside an adapter.

    Args:
        new: tokens that were added to the vocabulary; an adapter that is trained on may have rows of its own.
    """
    its = start.trained_rows(start.resolve_recipe_model(recipe).config)
    if recipe.get("use_peft") and (new or its) and launch.strategy.is_zero and launch.strategy.shards_weights:
        raise RecipeError(
            f"new tokens beside an adapter cannot be trained under {launch.strategy}",
            where=recipe.where("additional_special_tokens" if new else "model_name_or_path"),
            why="PEFT reads the embeddings outside of the modules for which their shards are gathered",
            help="accelerate_configs/ddp.yaml or zero2.yaml; or use_peft: false",
        )


def build(recipe: Recipe, step: StepLayout, precision: str, use_cpu: bool, strategy: Strategy) -> SFTConfig:
    """The training arguments. Creating them starts the process group.

    Raises:
        RecipeError: the libraries refuse a combination.
    """
    import torch
    from trl import SFTConfig

    asked = recipe.owned_by("SFTConfig")
    values: dict[str, Any] = {
        **{key: value for key, value in asked.items() if key not in recipe.plans()},
        "output_dir": str(recipe.output_dir),
        "per_device_train_batch_size": step.micro,
        "gradient_accumulation_steps": step.accumulation,
        "padding_free": False,  # whether rows lie end to end is decided once the model is known (model/attention.py)
        **(_accumulation(recipe) if strategy.is_fsdp else {}),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": use_cpu,
        **({} if torch.cuda.is_available() else {"dataloader_pin_memory": False}),  # only CUDA's copies gain by it
        **(dict.fromkeys(GPU_ONLY, False) if use_cpu else {}),
        # Rows come tokenized, cut, labelled and packed: TRL's own options for that are answered before.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "eos_token": None,
        "pad_token": None,
        "completion_only_loss": None,
        "assistant_only_loss": False,
        "chat_template_path": None,
        "model_init_kwargs": None,
        # A NaN is shown, not replaced by the last loss that was a number.
        "logging_nan_inf_filter": False,
    }
    with raise_as_recipe_errors(recipe):
        return SFTConfig(**values)


def _accumulation(recipe: Recipe) -> dict[str, Any]:
    """When FSDP reduces the gradients of a step's micro-batches."""
    asked = recipe.get("accelerator_config") or {}
    kwargs = {**(asked.get("gradient_accumulation_kwargs") or {}), "sync_each_batch": sums_sharded(recipe)}
    return {"accelerator_config": {**asked, "gradient_accumulation_kwargs": kwargs}}


@contextlib.contextmanager
def raise_as_recipe_errors(recipe: Recipe) -> Iterator[None]:
    """Raise RecipeError for what TRL or Transformers refuse in the block, such as a loss that this model lacks."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        message = str(error).strip()
        key = next((word for word in re.findall(r"\w+", message) if word in recipe.values), None)
        raise RecipeError(
            f"TRL or Transformers refuse these keys: {message}", where=recipe.where(key) if key else str(recipe.path)
        ) from None


def layout(recipe: Recipe, ranks: int) -> StepLayout:
    """An optimizer step's rows on the ranks: from `global_batch_size` where it is set, else as TRL means it.

    Raises:
        RecipeError: the global batch is smaller than the ranks, or contradicts the accumulation.
    """
    total, micro = recipe.get("global_batch_size"), recipe.get("per_device_train_batch_size")
    if micro == "auto":  # until the plan has answered
        micro = 1
    if total is None:
        steps = recipe.get("gradient_accumulation_steps")
        return StepLayout(micro * steps * ranks, micro, ranks, steps)
    found = split_batch(total, micro, ranks, recipe.where("global_batch_size"))
    if recipe.values.get("gradient_accumulation_steps", found.accumulation) != found.accumulation:
        raise RecipeError(
            f"gradient_accumulation_steps {recipe.get('gradient_accumulation_steps')} contradicts "
            f"global_batch_size {total}, from which {found.accumulation} follows on {ranks} rank{'s' * (ranks > 1)}",
            where=recipe.where("gradient_accumulation_steps"),
            help="remove one of the two (global_batch_size gives the same curve on any number of ranks)",
        )
    return found


def check_flags(allowed: list[str], callback_file: str | None) -> None:
    """Raise where `--allow_change` names no key of a recipe, or `--callback` no file: both are used much later."""
    for key in allowed:
        if key not in known_keys():
            raise convert.unknown_key(key, list(known_keys()), "command line --allow_change")
    if callback_file is not None and not os.path.isfile(callback_file):  # it does not raise for too long a name
        raise LaunchError(f"--callback {callback_file}: there is no such file", help=CALLBACK_HELP)


def load_callback(path: str | None) -> list[TrainerCallback]:
    """An instance of the class `Callback` of the user's Python file; empty without a file.

    It comes before the trainer's others: what it adds to `logs` reaches metrics.jsonl and the trackers.

    Raises:
        LaunchError: the file holds no class `Callback` that is one of Transformers'.
    """
    from transformers import TrainerCallback

    if path is None:
        return []
    file = Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise LaunchError(f"--callback {file} is no Python file", help=CALLBACK_HELP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    callback = getattr(module, "Callback", None)
    if not isinstance(callback, type) or not issubclass(callback, TrainerCallback):
        raise LaunchError(f"--callback {file} holds no class Callback(TrainerCallback)", help=CALLBACK_HELP)
    return [callback()]
