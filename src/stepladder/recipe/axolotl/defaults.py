"""What Axolotl does where a key is not set, and Stepladder or TRL would do something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepladder.recipe.axolotl import values
from stepladder.recipe.axolotl.config import Config


def _evaluation(config: Config) -> dict[str, Any]:
    told = config.has("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy")
    return {"eval_strategy": "epoch"} if config.evaluates() and not told else {}


def _evaluation_batch(config: Config) -> dict[str, Any]:
    return {"per_device_eval_batch_size": config.get("micro_batch_size", 1)} if config.evaluates() else {}


def _saving(config: Config) -> dict[str, Any]:
    told = config.get("saves_per_epoch") or config.get("save_steps")
    return {} if told else {"save_strategy": "epoch"}


# Axolotl's key, the recipe keys that stand for its default, and what is to be said of it.
DEFAULTS: list[tuple[str, Callable[[Config], dict[str, Any]], str]] = [
    ("sequence_len", lambda c: {"max_length": 512}, ""),
    ("lora_dropout", lambda c: {"lora_dropout": 0.0} if c.has("adapter") else {}, ""),
    ("num_epochs", lambda c: {} if c.get("max_steps") else {"num_train_epochs": 1}, ""),
    ("micro_batch_size", lambda c: {"per_device_train_batch_size": 1}, ""),
    ("eval_batch_size", _evaluation_batch, ""),
    ("lr_scheduler", lambda c: values.scheduler("cosine", c).recipe, ""),
    ("warmup_ratio", lambda c: {} if c.has("warmup_steps") else {"warmup_steps": 0.03}, "there at most 100 steps"),
    ("gradient_checkpointing", lambda c: {"gradient_checkpointing": False}, ""),
    ("bf16", lambda c: {} if c.get("fp16") else values.weights(c), values.HELD),
    ("eval_strategy", _evaluation, ""),
    ("save_strategy", _saving, ""),
    ("save_total_limit", lambda c: {} if c.get("save_strategy") == "no" else {"save_total_limit": 4}, ""),
]
