"""From a recipe to TRL's SFTConfig: what the recipe sets, and what follows from the ranks and the hardware."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stepladder.errors import RecipeError
from stepladder.recipe.recipe import Layout, Recipe, split_batch, sums_sharded

if TYPE_CHECKING:
    from trl import SFTConfig


# On a CPU they do nothing but end the run: TRL asks a GPU for its streams, and Liger's kernels are Triton's.
GPU_ONLY = ("activation_offloading", "use_liger_kernel")


def check_streaming(recipe: Recipe) -> None:
    """Raise RecipeError where a stream, whose length nobody knows, is given no number of steps."""
    for key in ("streaming", "dataset_streaming"):
        if recipe.get(key) and recipe.get("max_steps") < 1:
            raise RecipeError(
                f"{key} needs max_steps",
                where=recipe.where(key),
                why="how long an epoch is cannot be known before its end",
                help="max_steps: 1000, say",
            )


def build(recipe: Recipe, step: Layout, precision: str, use_cpu: bool, strategy: str) -> SFTConfig:
    """The training arguments, under a strategy as the launch names it. Creating them starts the process group.

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
        **(_accumulation(recipe) if strategy.startswith("fsdp") else {}),
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
    with refused(recipe):
        return SFTConfig(**values)


def _accumulation(recipe: Recipe) -> dict[str, Any]:
    """When FSDP reduces the gradients of a step's micro-batches."""
    asked = recipe.get("accelerator_config") or {}
    kwargs = {**(asked.get("gradient_accumulation_kwargs") or {}), "sync_each_batch": sums_sharded(recipe)}
    return {"accelerator_config": {**asked, "gradient_accumulation_kwargs": kwargs}}


@contextlib.contextmanager
def refused(recipe: Recipe) -> Iterator[None]:
    """Raise RecipeError for what the libraries refuse in the block, such as a loss that this model does not have."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        said = str(error).strip()
        named = [recipe.where(word) for word in re.findall(r"\w+", said) if word in recipe.values]
        raise RecipeError(
            f"TRL or Transformers refuse these keys: {said}", where=named[0] if named else str(recipe.path)
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
    found = split_batch(total, micro, ranks, recipe.where("global_batch_size"))
    if recipe.values.get("gradient_accumulation_steps", found.accumulation) != found.accumulation:
        raise RecipeError(
            f"gradient_accumulation_steps {recipe.get('gradient_accumulation_steps')} contradicts "
            f"global_batch_size {total}, from which {found.accumulation} follows on {ranks} rank{'s' * (ranks > 1)}",
            where=recipe.where("gradient_accumulation_steps"),
            help="remove one of the two (global_batch_size gives the same curve on any number of ranks)",
        )
    return found
