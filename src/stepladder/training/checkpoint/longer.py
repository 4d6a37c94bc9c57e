"""Whether a finished run can be trained on: by more steps, or, where early stopping has ended it, by more patience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepladder.errors import LaunchError
from stepladder.recipe.recipe import Recipe

LENGTH = ("max_steps", "num_train_epochs")
PATIENCE = "early_stopping_patience"
EARLY_STOPPING = "early_stopping_count"  # in a checkpoint's state.json: evaluations in a row without an improvement
# What may differ from the recipe of a finished run. The curve up to its end would have been the same with any patience.
TRAINS_ON = (*LENGTH, PATIENCE)


def describe_keys(manifest: dict[str, Any]) -> str:
    """The keys that train a finished run on, for a message."""
    return f"--{PATIENCE}" if manifest.get("stopped_early") else "--max_steps or --num_train_epochs"


def check_kept(last: Path | None, recipe: Recipe, folder: Path) -> None:
    """Raise LaunchError where a finished run has no checkpoint."""
    if last is None:
        raise LaunchError(
            f"the run in {folder} is finished and kept no checkpoint to train on from",
            where=recipe.where("output_dir"),
            why="its save_strategy was no",
            help=f"--model_name_or_path {folder} and another --output_dir train its result on, with a new optimizer",
        )


def check_longer(recipe: Recipe, folder: Path, trainer_state: dict[str, Any], counters: dict[str, Any]) -> None:
    """Raise LaunchError where a finished run is not asked for more than it has.

    Args:
        trainer_state: of its last checkpoint, Transformers' own.
        counters: the checkpoint's state.json; empty where it holds the weights only.
    """
    patience, count = recipe.get(PATIENCE), counters.get(EARLY_STOPPING, 0)
    if patience is not None and count >= patience:
        raise LaunchError(
            f"the run in {folder} is finished: early stopping ends it at step {trainer_state['global_step']}, after "
            f"{count} evaluations in a row without an improvement",
            where=recipe.where(PATIENCE),
            help=f"--{PATIENCE} {count + 1} or more trains it on; --overwrite replaces it",
        )
    key = LENGTH[0] if recipe.get(LENGTH[0]) > 0 else LENGTH[1]
    done = trainer_state["global_step"] if key == LENGTH[0] else trainer_state["epoch"]
    if recipe.get(key) <= done:
        raise LaunchError(
            f"the run in {folder} is finished: {key}: {recipe.get(key):g} is not more than the {done:g} that it has",
            where=recipe.where(key),
            help=f"a larger {key} trains it on; --overwrite replaces it",
        )
