"""The range of every number that a recipe can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """A set of numbers, and how one says it: '`learning_rate` is a number above 0'."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or more", lambda x: x >= 0)
COUNT = Range("1 or more", lambda x: x >= 1)
PROPER_SHARE = Range("from 0 up to, but not including, 1", lambda x: 0 <= x < 1)
SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
# The libraries read a number below 1 as a share of all, any other as a count.
SHARE_OR_COUNT = Range("a share below 1, or a whole number from 1 up", lambda x: 0 < x < 1 or (x >= 1 and x % 1 == 0))
NONE_OR_SHARE_OR_COUNT = Range(
    "0, a share below 1, or a whole number from 1 up", lambda x: x == 0 or SHARE_OR_COUNT.holds(x)
)
STEPS_OR_OFF = Range("-1 (off), or 1 or more", lambda x: x == -1 or x >= 1)
SEED = Range("from 0 to 4294967295", lambda x: 0 <= x < 2**32)

RANGES: dict[str, Range] = {
    # ---- data ----
    "dataset_num_proc": COUNT,
    "datasets.fraction": SHARE,
    "datasets.rows": SHARE_OR_COUNT,
    "datasets.weight": POSITIVE,
    "max_length": COUNT,
    "mix_general": PROPER_SHARE,
    "pad_to_multiple_of": COUNT,
    "test_split_size": SHARE_OR_COUNT,
    # ---- method ----
    "lora_alpha": COUNT,
    "lora_dropout": PROPER_SHARE,
    "lora_r": COUNT,
    "num_virtual_tokens": COUNT,
    "router_aux_loss_coef": NOT_NEGATIVE,
    # ---- training ----
    "adam_beta1": PROPER_SHARE,
    "adam_beta2": PROPER_SHARE,
    "adam_epsilon": POSITIVE,
    "global_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "label_smoothing_factor": PROPER_SHARE,
    "learning_rate": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "max_steps": STEPS_OR_OFF,
    "neftune_noise_alpha": POSITIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "torch_empty_cache_steps": COUNT,
    "warmup_steps": NONE_OR_SHARE_OR_COUNT,
    "weight_decay": NOT_NEGATIVE,
    # ---- evaluation, saving, logging ----
    "eval_accumulation_steps": COUNT,
    "eval_delay": NOT_NEGATIVE,
    "eval_steps": SHARE_OR_COUNT,
    "logging_steps": SHARE_OR_COUNT,
    "per_device_eval_batch_size": COUNT,
    "save_steps": SHARE_OR_COUNT,
    "save_total_limit": COUNT,
    # ---- machine ----
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "hang_timeout": POSITIVE,
    # ---- inside blocks ----
    "accelerator_config.gradient_accumulation_kwargs.num_steps": COUNT,
    "activation_checkpointing_kwargs.every_n_layers": COUNT,
    "gradient_checkpointing_kwargs.every_n_layers": COUNT,
    "lr_scheduler_kwargs.cooldown": NOT_NEGATIVE,
    "lr_scheduler_kwargs.eps": NOT_NEGATIVE,
    "lr_scheduler_kwargs.factor": PROPER_SHARE,
    "lr_scheduler_kwargs.lr_end": NOT_NEGATIVE,
    "lr_scheduler_kwargs.max_lr": POSITIVE,
    "lr_scheduler_kwargs.min_lr": NOT_NEGATIVE,
    "lr_scheduler_kwargs.min_lr_rate": PROPER_SHARE,
    "lr_scheduler_kwargs.min_lr_ratio": PROPER_SHARE,
    "lr_scheduler_kwargs.num_cycles": POSITIVE,
    "lr_scheduler_kwargs.num_decay_steps": COUNT,
    "lr_scheduler_kwargs.num_stable_steps": COUNT,
    "lr_scheduler_kwargs.patience": NOT_NEGATIVE,
    "lr_scheduler_kwargs.power": POSITIVE,
    "lr_scheduler_kwargs.reset_start": NOT_NEGATIVE,
    "lr_scheduler_kwargs.threshold": NOT_NEGATIVE,
    "lr_scheduler_kwargs.timescale": COUNT,
    "lr_scheduler_kwargs.warmup": NOT_NEGATIVE,
    "lr_scheduler_kwargs.warmup_lr_rate": PROPER_SHARE,
    "lr_scheduler_kwargs.window_size": COUNT,
}


def outside(name: str, value: Any) -> str:
    """What the number `value` of the key `name` should be, or nothing where it is that.

    The keys inside the blocks of a list are named without their place in it: `datasets.rows`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not math.isfinite(value):
        return "finite"
    known = RANGES.get(re.sub(r"\[\d+\]", "", name))
    return "" if known is None or known.holds(value) else known.words
