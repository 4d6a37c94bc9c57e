"""What the trainer is built from: TRL's SFTConfig and the step's layout by the recipe, and the user's callback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.errors import LaunchError, RecipeError
from stepladder.recipe import batch
from stepladder.recipe.batch import Layout
from stepladder.recipe.recipe import Recipe
from stepladder.training.launch.launcher import Strategy

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTConfig


# On a CPU these would end the run: TRL asks a GPU for its streams, and Liger's kernels are Triton's.
GPU_ONLY = ("activation_offloading", "use_liger_kernel")


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


def build(recipe: Recipe, step: Layout, precision: str, use_cpu: bool, strategy: Strategy) -> SFTConfig:
    """The training arguments. Creating them starts the process group.

    Raises:
        RecipeError: the libraries refuse a combination.
    """
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
    with library_errors_as_recipe_errors(recipe):
        return SFTConfig(**values)


def _accumulation(recipe: Recipe) -> dict[str, Any]:
    """When FSDP reduces the gradients of a step's micro-batches."""
    asked = recipe.get("accelerator_config") or {}
    kwargs = {**(asked.get("gradient_accumulation_kwargs") or {}), "sync_each_batch": batch.sums_sharded(recipe)}
    return {"accelerator_config": {**asked, "gradient_accumulation_kwargs": kwargs}}


@contextlib.contextmanager
def library_errors_as_recipe_errors(recipe: Recipe) -> Iterator[None]:
    """Raise RecipeError for what TRL or Transformers refuse in the block, such as a loss that this model lacks."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        message = str(error).strip()
        key = next((word for word in re.findall(r"\w+", message) if word in recipe.values), None)
        raise RecipeError(
            f"TRL or Transformers refuse these keys: {message}", where=recipe.where(key) if key else str(recipe.path)
        ) from None


def layout(recipe: Recipe, ranks: int) -> Layout:
    """An optimizer step's rows on the ranks: from `global_batch_size` where it is set, else as TRL means it.

    Raises:
        RecipeError: the global batch is smaller than the ranks, or contradicts the accumulation.
    """
    total, micro = recipe.get("global_batch_size"), recipe.get("per_device_train_batch_size")
    if micro == "auto":  # until the plan has answered
        micro = 1
    if total is None:
        steps = recipe.get("gradient_accumulation_steps")
        return Layout(micro * steps * ranks, micro, ranks, steps)
    found = batch.layout(total, micro, ranks, recipe.where("global_batch_size"))
    if recipe.values.get("gradient_accumulation_steps", found.accumulation) != found.accumulation:
        raise RecipeError(
            f"gradient_accumulation_steps {recipe.get('gradient_accumulation_steps')} contradicts "
            f"global_batch_size {total}, from which {found.accumulation} follows on {ranks} rank{'s' * (ranks > 1)}",
            where=recipe.where("gradient_accumulation_steps"),
            help="remove one of the two (global_batch_size gives the same curve on any number of ranks)",
        )
    return found


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
    help = "docs/prometheus.py is one"
    if not os.path.isfile(file):  # unlike Path.is_file, it does not raise for a name that is too long
        raise LaunchError(f"--callback {file}: there is no such file", help=help)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise LaunchError(f"--callback {file} is no Python file", help=help)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    callback = getattr(module, "Callback", None)
    if not isinstance(callback, type) or not issubclass(callback, TrainerCallback):
        raise LaunchError(f"--callback {file} holds no class Callback(TrainerCallback)", help=help)
    return [callback()]
