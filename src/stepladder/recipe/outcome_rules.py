"""Rules for what comes of a run: evaluation, saving, trackers and the hub."""

from __future__ import annotations

from typing import Any

from stepladder.recipe.optimizer_rules import BY_METRIC
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.ruling import RuleBreak, conflict, idle, rule, shown


@rule
def evaluation_keys_need_evaluation(recipe: Recipe) -> RuleBreak | None:
    """Nothing is evaluated."""
    if recipe.get("eval_strategy") != "no":
        return None
    # Many recipes carry these along; where the data lies may stay when evaluation is switched off in so many words.
    carried = ["per_device_eval_batch_size", "dataset_test_split"]
    carried += ["eval_dataset_name"] if "eval_strategy" in recipe.values else []
    idle(recipe, "eval_strategy", carried, harmless=True)
    keys = ["eval_dataset_name", "eval_steps", "eval_delay", "eval_on_start"]
    return idle(recipe, "eval_strategy", keys, "eval_strategy: epoch, or steps")


@rule
def eval_steps_need_steps(recipe: Recipe) -> RuleBreak | None:
    """Evaluation runs at the end of each epoch."""
    by_epoch = recipe.get("eval_strategy") == "epoch"
    return idle(recipe, "eval_strategy", ["eval_steps"], "eval_strategy: steps") if by_epoch else None


@rule
def save_steps_need_steps(recipe: Recipe) -> RuleBreak | None:
    """Checkpoints are not saved by steps."""
    by_steps = recipe.get("save_strategy") == "steps"
    return None if by_steps else idle(recipe, "save_strategy", ["save_steps"], "save_strategy: steps")


@rule
def checkpoint_keys_need_checkpoints(recipe: Recipe) -> RuleBreak | None:
    """No checkpoint is saved on the way; the result is saved at the end in any case."""
    saves = recipe.get("save_strategy") != "no"
    keys = ["save_total_limit", "save_only_model"]
    return None if saves else idle(recipe, "save_strategy", keys, "save_strategy: steps")


@rule
def logging_steps_need_steps(recipe: Recipe) -> RuleBreak | None:
    """The loss is not logged by steps."""
    by_steps = recipe.get("logging_strategy") == "steps"
    return None if by_steps else idle(recipe, "logging_strategy", ["logging_steps"], "logging_strategy: steps")


@rule
def best_model_is_evaluated_and_saved(recipe: Recipe) -> RuleBreak | None:
    """The best checkpoint is chosen among those that were both evaluated and saved."""
    evaluates, saves = recipe.get("eval_strategy"), recipe.get("save_strategy")
    if not recipe.get("load_best_model_at_end") and saves != "best":
        return None
    keys = ["eval_strategy", "save_strategy", "load_best_model_at_end"]
    key = "load_best_model_at_end" if recipe.get("load_best_model_at_end") else "save_strategy"
    if evaluates == "no":
        return conflict(recipe, f"{shown(recipe, key)} without evaluation", keys, "eval_strategy: epoch", at=key)
    if saves == "best":
        if recipe.get("metric_for_best_model") is None:
            return conflict(recipe, "save_strategy: best without a metric", keys, "metric_for_best_model: loss", at=key)
        return None
    if saves != evaluates:
        what = f"load_best_model_at_end with eval_strategy: {evaluates} and save_strategy: {saves}"
        return conflict(recipe, what, keys, f"save_strategy: {evaluates}", at=key)
    every = recipe.get("eval_steps") or recipe.get("logging_steps")
    times = recipe.get("save_steps") / every
    if evaluates == "steps" and (abs(times - round(times)) > 1e-6 or (recipe.get("save_steps") < 1) != (every < 1)):
        what = f"load_best_model_at_end with save_steps {recipe.get('save_steps'):g} and eval_steps {every:g}"
        return conflict(
            recipe, what, [*keys, "save_steps", "eval_steps"], "save_steps: a multiple of eval_steps", at=key
        )
    return None


@rule
def metric_keys_need_a_choice(recipe: Recipe) -> RuleBreak | None:
    """No checkpoint is chosen by a metric, and no schedule follows one."""
    chooses = recipe.get("load_best_model_at_end") or recipe.get("save_strategy") == "best"
    if chooses or recipe.get("lr_scheduler_type") in BY_METRIC:
        return None
    keys = ["metric_for_best_model", "greater_is_better"]
    return idle(recipe, "load_best_model_at_end", keys, "load_best_model_at_end: true")


@rule
def tracker_keys_need_a_tracker(recipe: Recipe) -> RuleBreak | None:
    """No service is told of the run that would show them."""
    if _trackers(recipe) - {"none"}:
        return None
    return idle(recipe, "report_to", ["run_name"], "report_to: wandb")


@rule
def trackio_keys_need_trackio(recipe: Recipe) -> RuleBreak | None:
    """Only Trackio reads them."""
    keys = ["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"]
    return None if _trackers(recipe) & {"trackio", "all"} else idle(recipe, "report_to", keys, "report_to: trackio")


@rule
def wandb_keys_need_wandb(recipe: Recipe) -> RuleBreak | None:
    """Only W&B reads them."""
    keys = ["wandb_entity", "wandb_run_group", "wandb_tags", "wandb_log_model"]
    return None if _trackers(recipe) & {"wandb", "all"} else idle(recipe, "report_to", keys, "report_to: wandb")


@rule
def project_needs_a_tracker_with_projects(recipe: Recipe) -> RuleBreak | None:
    """Only Trackio and W&B read it."""
    with_projects = _trackers(recipe) & {"trackio", "wandb", "all"}
    return None if with_projects else idle(recipe, "report_to", ["project"], "report_to: wandb")


@rule
def hub_keys_need_a_push(recipe: Recipe) -> RuleBreak | None:
    """Nothing is pushed to the hub."""
    keys = ["hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"]
    if not _trackers(recipe) & {"trackio", "all"}:  # whose space is as private as the model
        keys.append("hub_private_repo")
    return None if recipe.get("push_to_hub") else idle(recipe, "push_to_hub", keys, "push_to_hub: true")


def _trackers(recipe: Recipe) -> set[str]:
    names: Any = recipe.get("report_to") or []
    return {names} if isinstance(names, str) else {*names}
