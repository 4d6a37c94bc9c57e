"""A recipe that has been read: values by key, where each was set, and how its global batch is split over ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stepladder.errors import RecipeError
from stepladder.recipe.schema import BY_PLAN, known_keys
from stepladder.settings import Settings

# Keys that say where a run lies and how it is watched, not what it computes.
NOT_PART_OF_THE_RUN = {
    *("output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "project"),
    *("wandb_entity", "wandb_run_group", "wandb_tags", "wandb_log_model"),
}
# Keys that decide what a run shows and keeps, but not its curve: they may change as it is resumed.
# (Evaluation draws no random numbers of the run's; see `Trainer.evaluate`.)
NOT_OF_THE_CURVE = NOT_PART_OF_THE_RUN | {
    *("logging_steps", "logging_strategy", "logging_first_step", "log_level_replica", "log_on_each_node"),
    *("save_steps", "save_strategy", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("eval_steps", "eval_strategy", "eval_delay", "eval_on_start", "eval_dataset_name", "per_device_eval_batch_size"),
    *("trackio_space_id", "include_num_input_tokens_seen", "push_to_hub", "hub_model_id", "hub_strategy"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("dataset_num_proc", "ddp_timeout", "hang_timeout", "on_nan", "skip_memory_metrics", "torch_empty_cache_steps"),
    # how the global batch is cut; that it stays the same is checked when the ranks are known
    *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
}
# Schedules that follow a metric of the evaluation (rules.yaml names them too).
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


@dataclass
class Recipe:
    """What was asked for: the keys that were set, each with its origin (`file:line:column`).

    `origins` holds the places of keys inside blocks too (`lr_scheduler_kwargs.min_lr`). `layers`
    says which file set a key: 0 the remotest parent, the highest number the command line. `replaced`
    holds the values that a later layer replaced or left without effect.
    """

    name: str
    path: Path
    values: dict[str, Any]
    origins: dict[str, str]
    notes: list[str] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """The value set for `key`, or the library's default; a key that nobody knows is a programming error."""
        return self.values[key] if key in self.values else known_keys()[key].default

    def where(self, key: str) -> str:
        return self.origins.get(key, f"{self.path} (default)")

    @property
    def output_dir(self) -> Path:
        return Path(self.values.get("output_dir") or Path("runs") / self.name)

    def plans(self) -> list[str]:
        """The keys that are left to the plan."""
        return [key for key in BY_PLAN if self.values.get(key) == "auto"]

    def foreign_evaluation(self) -> str:
        """The evaluation set that came with other training data than the recipe has now; empty where none did."""
        key = "datasets" if self.get("datasets") else "dataset_name"
        evaluation, layers = self.get("eval_dataset_name"), self.layers
        if not evaluation or self.get("eval_strategy") == "no":
            return ""
        if layers.get("eval_dataset_name", 0) >= layers.get(key, 0):
            return ""
        before, now = _data_names(self.replaced), _data_names(self.values)
        return evaluation if before and not before & now else ""

    def with_values(self, **values: Any) -> Recipe:
        """The same recipe with these keys set."""
        return dataclasses.replace(self, values=self.values | values)

    def owned_by(self, owner: str) -> dict[str, Any]:
        """The keys set that belong to one of TRL's dataclasses, as its constructor takes them."""
        keys = known_keys()
        return {name: value for name, value in self.values.items() if keys[name].owner == owner}

    def hash(self) -> str:
        """The identity of what the recipe computes (SHA-256, 16 hexadecimal digits)."""
        content = {k: v for k, v in sorted(self.values.items()) if k not in NOT_PART_OF_THE_RUN}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def changes(self, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The keys of the curve in which this recipe differs from another's values: `{key: (old, new)}`."""
        known, now = known_keys(), self.values

        def value(values: dict[str, Any], key: str) -> Any:
            return values[key] if key in values else known[key].default if key in known else None

        keys = [key for key in {**before, **now} if key not in NOT_OF_THE_CURVE]
        pairs = {key: (value(before, key), value(now, key)) for key in keys}
        return {key: (old, new) for key, (old, new) in pairs.items() if old != new}

    def to_yaml(self) -> str:
        """The resolved recipe: to load it gives the same values again."""
        return yaml.dump(self.values, Dumper=_Plainly, sort_keys=False, allow_unicode=True)


def _data_names(values: dict[str, Any]) -> set[str]:
    blocks = values.get("datasets") or []
    return {name for name in (values.get("dataset_name"), *(block.get("path") for block in blocks)) if name}


class _Plainly(yaml.SafeDumper):
    """Writes a value out wherever it stands, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class StepLayout:
    """One optimizer step: `rows` sequences in `accumulation` micro-batches of `micro` places on each of `ranks`.

    The same rows are trained in a step on any number of ranks. Places without a row are filled with padding rows,
    which train nothing.
    """

    rows: int
    micro: int
    ranks: int
    accumulation: int

    @property
    def batches(self) -> int:
        """Micro-batches of a step, over all ranks; the ranks take them in turn."""
        return self.accumulation * self.ranks

    @property
    def places(self) -> int:
        return self.batches * self.micro

    def spread(self, items: Sequence[int], empty: int) -> Iterator[int]:
        """At most `rows` items over the micro-batches, as evenly as they go, each filled up with `empty`."""
        for number in range(self.batches):
            first, end = (len(items) * edge // self.batches for edge in (number, number + 1))
            yield from items[first:end]
            yield from [empty] * (self.micro - (end - first))


def split_batch(global_batch_size: int, micro_batch_size: int, ranks: int, where: str = "") -> StepLayout:
    """The fewest micro-batches of at most `micro_batch_size` sequences that hold the global batch on `ranks` ranks.

    They are no larger than they need to be: 8 sequences on 4 ranks are 2 for each, whatever one rank could hold, so
    that a recipe that is right for one GPU is right for a node of them.

    Raises:
        RecipeError: a batch size below 1, or fewer sequences than ranks.
    """
    if min(global_batch_size, micro_batch_size) < 1:
        raise RecipeError("batch sizes are whole numbers from 1 up", where=where)
    if global_batch_size < ranks:
        raise RecipeError(
            f"global_batch_size {global_batch_size} is smaller than the {ranks} ranks",
            where=where,
            why="some of them would have nothing to train at any step",
            help=f"global_batch_size: {ranks}, or --num_processes {global_batch_size}",
        )
    accumulation = -(-global_batch_size // (micro_batch_size * ranks))
    micro = -(-global_batch_size // (accumulation * ranks))
    return StepLayout(global_batch_size, micro, ranks, accumulation)


def sums_sharded(settings: Settings) -> bool:
    """Whether FSDP reduces the gradients after every micro-batch, so that a rank keeps its shard of their sum.

    Else it sums whole gradients in fp32 until the step's last micro-batch (`set_requires_gradient_sync`). Of a whole
    model no GPU could hold them, and with an adapter torch 2.13 fails in bf16 on a head that nothing gathers, since
    TRL reads its weight (`to_accumulated_grad_if_needed` in `_fsdp_param.py`).
    """
    asked = (settings.get("accelerator_config") or {}).get("gradient_accumulation_kwargs") or {}
    chosen = asked.get("sync_each_batch")
    return True if chosen is None else bool(chosen)
