"""Rules of optimizers and learning-rate schedules: which keys each of them reads."""

from __future__ import annotations

from stepladder.recipe.recipe import Recipe
from stepladder.recipe.ruling import RuleBreak, conflict, idle, rule
from stepladder.recipe.schema import known_keys

# By what transformers/trainer_optimizer.py and optimization.py read; tests/test_rules.py holds them to it.
READ_OPTIM_ARGS = (
    *("anyprecision", "ademamix", "sgd", "adagrad", "rmsprop", "galore", "apollo", "grokadamw", "schedule_free"),
    *("adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw"),
)
NO_BETAS = ("adafactor", "sgd", "adagrad", "rmsprop", "galore", "lomo", "grokadamw")
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


@rule
def warmup_needs_a_schedule_that_warms_up(recipe: Recipe) -> RuleBreak | None:
    """This schedule starts at the full learning rate."""
    schedule, optimizer = recipe.get("lr_scheduler_type"), recipe.get("optim")
    if schedule not in WITHOUT_WARMUP or optimizer in ("schedule_free_adamw", "schedule_free_sgd"):
        return None
    return idle(recipe, "lr_scheduler_type", ["warmup_steps"], "lr_scheduler_type: constant_with_warmup")


@rule
def schedule_arguments_fit_the_schedule(recipe: Recipe) -> RuleBreak | None:
    """Each schedule reads its own arguments; the others would be ignored, or stop the run at its start."""
    schedule, given = recipe.get("lr_scheduler_type"), recipe.get("lr_scheduler_kwargs") or {}
    takers = {key.name: key.owner.split() for key in known_keys()["lr_scheduler_kwargs"].nested}
    wrong = [name for name in given if schedule not in takers[name]]
    if not wrong:
        return None
    at = f"lr_scheduler_kwargs.{wrong[0]}"
    taken = [name for name, schedules in takers.items() if schedule in schedules]
    help = f"{wrong[0]} belongs to {', '.join(takers[wrong[0]])}; {schedule} takes {', '.join(taken) or 'none'}"
    if len(wrong) == len(given) and not idle(recipe, "lr_scheduler_type", ["lr_scheduler_kwargs"]):
        return None  # the schedule was overridden, and the whole block is left out
    what = f"{at} has no effect with lr_scheduler_type: {schedule}"
    return conflict(recipe, what, ["lr_scheduler_type", "lr_scheduler_kwargs"], help, at=at)


@rule
def schedule_arguments_are_there(recipe: Recipe) -> RuleBreak | None:
    """The schedule cannot be computed otherwise."""
    schedule, given = recipe.get("lr_scheduler_type"), recipe.get("lr_scheduler_kwargs") or {}
    keys = ["lr_scheduler_kwargs", "lr_scheduler_type"]
    needed = ["min_lr", "min_lr_rate"] if schedule.endswith("with_min_lr") else []
    if needed and sum(given.get(name) is not None for name in needed) != 1:
        what = f"lr_scheduler_type: {schedule} takes either min_lr or min_lr_rate"
        return conflict(recipe, what, keys, "lr_scheduler_kwargs: {min_lr_rate: 0.1}")
    if schedule == "warmup_stable_decay" and given.get("num_decay_steps") is None:
        what = f"lr_scheduler_type: {schedule} needs num_decay_steps"
        return conflict(recipe, what, keys, "lr_scheduler_kwargs: {num_decay_steps: 100}")
    return None


@rule
def schedules_by_metric_need_evaluation(recipe: Recipe) -> RuleBreak | None:
    """The schedule follows a metric of the evaluation."""
    schedule, keys = recipe.get("lr_scheduler_type"), ["eval_strategy", "lr_scheduler_type"]
    if schedule in BY_METRIC and recipe.get("eval_strategy") == "no":
        return conflict(recipe, f"lr_scheduler_type: {schedule} without evaluation", keys, "eval_strategy: steps")
    return None


@rule
def optimizer_reads_its_arguments(recipe: Recipe) -> RuleBreak | None:
    """This optimizer reads no further arguments."""
    reads = any(part in recipe.get("optim") for part in READ_OPTIM_ARGS)
    return None if reads else idle(recipe, "optim", ["optim_args"])


@rule
def optimizer_projects_modules(recipe: Recipe) -> RuleBreak | None:
    """Only GaLore and APOLLO project the gradients of chosen modules."""
    projects = any(part in recipe.get("optim") for part in ("galore", "apollo"))
    return None if projects else idle(recipe, "optim", ["optim_target_modules"])


@rule
def optimizer_has_moments(recipe: Recipe) -> RuleBreak | None:
    """Only Adam and its kin are handed these by Transformers."""
    optimizer = recipe.get("optim")
    if any(part in optimizer for part in NO_BETAS):
        return idle(recipe, "optim", ["adam_beta1", "adam_beta2", "adam_epsilon"], "optim: adamw_torch_fused")
    return idle(recipe, "optim", ["adam_epsilon"]) if "lion" in optimizer else None
