"""No key without effect: the rules that need code, and the check of a recipe by all rules.

rules.yaml holds the other rules. The docstring of a rule's function is the reason that a person reads. Where a key
lost its use because the command line (or a recipe that extends another) set a different one, nobody made a mistake:
it is left out with a note, so that `--max_steps 20` works on any recipe.
"""

from __future__ import annotations

import re

from stepladder.flags import FP32_MAX
from stepladder.recipe import peft_rules
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.rule_engine import TABLE, Check, RuleBreak, build_rules, conflict, format_key, idle
from stepladder.recipe.schema import known_keys
from stepladder.suggest import suggest

ATTENTION = ("auto", "sdpa", "eager", *(f"flash_attention_{n}" for n in (2, 3, 4)), "flex_attention")
# Keys of a block in model_init_kwargs that the recipe has at its top, by which name.
OWN_KEY = {
    **{"attn_implementation": "attn_implementation", "dtype": "dtype", "torch_dtype": "dtype"},
    **{"quantization_config": "load_in_4bit", "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit"},
    **{"revision": "model_revision", "trust_remote_code": "trust_remote_code"},
    "use_safetensors": "",  # always true
}
OWN_SPLIT = "eval_dataset_name: null holds a part of the training rows out; or no test_split_size"
OWN_ROWS = "--eval_dataset_name FILE, --test_split_size 0.1 to hold out a part of your own rows, or --eval_strategy no"

# By key: why it is refused, maybe what helps, and which value beside its default is accepted.
REFUSED: dict[str, dict] = TABLE["refused"]

CHECKS: dict[str, Check] = {}


def register(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


def check(recipe: Recipe) -> list[RuleBreak]:
    """All rules that the recipe breaks. Keys that an override made idle are taken out of it, with a note."""
    broken = [found for rule in RULES.values() if (found := rule.broken_by(recipe))]
    for key, row in REFUSED.items():
        accepted = row.get("accepted", known_keys()[key].default)
        if key in recipe.values and recipe.values[key] not in (accepted, None):
            # a token is not repeated: the message goes into a job's log
            what = f"{key if key == 'hub_token' else format_key(recipe, key)} cannot be used"
            out = row.get("help", "remove it")
            broken.append(RuleBreak(what, keys=[key], why=row["why"], help=out, where=recipe.where(key)))
    return broken


# ---- model and method ----


@register
def attention_is_a_kernel_that_trains(recipe: Recipe) -> RuleBreak | None:
    """It is one of Transformers' kernels or a repository of kernels on the hub; the `paged` ones are for generation."""
    key = "attn_implementation"
    kernel = recipe.get(key)
    if kernel is None or kernel in ATTENTION or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?", kernel):
        return None
    help = suggest(kernel, ATTENTION) or f"one of {', '.join(ATTENTION)}"
    return conflict(recipe, f"{key}: there is no '{kernel}' to train with", [key], help)


@register
def target_modules_are_names_or_one_pattern(recipe: Recipe) -> RuleBreak | None:
    """PEFT takes a list of module names, the word all-linear, or one regular expression over whole module names."""
    key = "lora_target_modules"
    modules = recipe.get(key) or []
    others = [name for name in modules if not name.replace(".", "_").isidentifier()]
    if len(modules) > 1 and others:
        what = f"{key}: '{others[0]}' is no module name, and stands in a list"
        return conflict(recipe, what, [key], f"{key}: '{others[0]}' alone, or names only")
    try:
        re.compile(others[0] if others else "")
    except (re.error, OverflowError, RecursionError) as error:
        what = f"{key}: '{others[0]}' is no regular expression: {error}"
        return conflict(recipe, what, [key], f"{key}: '.*\\.(q|v)_proj', or a list of names")
    return None


@register
def products_are_numbers_of_fp32(recipe: Recipe) -> RuleBreak | None:
    """The optimizer multiplies them in fp32, where the product is infinite: the first update would be no number."""
    rate = recipe.get("learning_rate") or 0
    for key in ("loraplus_lr_ratio", "weight_decay"):
        if rate * (recipe.get(key) or 0) > FP32_MAX:
            what = f"{format_key(recipe, key)} times {format_key(recipe, 'learning_rate')} is beyond {FP32_MAX:.2g}"
            return conflict(recipe, what, ["learning_rate", key], f"a smaller {key}", at=key)
    return None


@register
def special_tokens_are_texts(recipe: Recipe) -> RuleBreak | None:
    """Special tokens are cut out of the rows as they are written: texts without blanks around them, each named once."""
    key = "additional_special_tokens"
    tokens = recipe.get(key) or []
    for number, token in enumerate(tokens):
        fault = ""
        if token != token.strip() or not token:
            fault = f"{token!r} has blanks around it" if token.strip() else f"{token!r} is empty"
        elif token in tokens[:number]:
            fault = f"{token!r} stands there twice"
        elif not token.isprintable():  # lone surrogates and control characters
            fault = f"{token!a} holds characters that cannot be printed"
        if fault:
            return conflict(recipe, f"{key}: {fault}", [key], f'{key}: ["<tool>", "</tool>"], say')
    return None


@register
def dtype_of_a_quantized_base(recipe: Recipe) -> RuleBreak | None:
    """What is not quantized is held in the precision that training computes in, which bf16 and fp16 decide."""
    bf16, fp16 = recipe.get("bf16"), recipe.get("fp16")
    precision = "bfloat16" if bf16 is True else "float16" if fp16 else "float32" if bf16 is False else "auto"
    if recipe.get("dtype") == precision != "auto":
        return None  # it says what happens anyway
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe.get(key):
            return idle(recipe, key, ["dtype"], "bf16: true for bfloat16, fp16: true for float16")
    return None


@register
def model_init_kwargs_repeat_no_key(recipe: Recipe) -> RuleBreak | None:
    """A setting that the recipe has a key for is set by that key only."""
    for name in (name for name in recipe.get("model_init_kwargs") or {} if name in OWN_KEY):
        at = f"model_init_kwargs.{name}"
        help = f"{OWN_KEY[name]}: …" if OWN_KEY[name] else "remove it: weights are read from safetensors only"
        return conflict(recipe, f"{at} cannot be used", ["model_init_kwargs"], help, at=at)
    return None


# ---- learning-rate schedules ----


@register
def schedule_arguments_fit_the_schedule(recipe: Recipe) -> RuleBreak | None:
    """Each schedule reads its own arguments; the others would be ignored, or stop the run at its start."""
    schedule, arguments = recipe.get("lr_scheduler_type"), recipe.get("lr_scheduler_kwargs") or {}
    takers = {key.name: key.owner.split() for key in known_keys()["lr_scheduler_kwargs"].nested}
    wrong = [name for name in arguments if schedule not in takers[name]]
    if not wrong:
        return None
    at = f"lr_scheduler_kwargs.{wrong[0]}"
    taken = [name for name, schedules in takers.items() if schedule in schedules]
    help = f"{wrong[0]} belongs to {', '.join(takers[wrong[0]])}; {schedule} takes {', '.join(taken) or 'none'}"
    if len(wrong) == len(arguments) and not idle(recipe, "lr_scheduler_type", ["lr_scheduler_kwargs"]):
        return None  # the schedule was overridden, and the whole block is left out
    what = f"{at} has no effect with lr_scheduler_type: {schedule}"
    return conflict(recipe, what, ["lr_scheduler_type", "lr_scheduler_kwargs"], help, at=at)


@register
def schedule_arguments_are_there(recipe: Recipe) -> RuleBreak | None:
    """The schedule cannot be computed otherwise."""
    schedule, arguments = recipe.get("lr_scheduler_type"), recipe.get("lr_scheduler_kwargs") or {}
    keys = ["lr_scheduler_kwargs", "lr_scheduler_type"]
    needed = ["min_lr", "min_lr_rate"] if schedule.endswith("with_min_lr") else []
    if needed and sum(arguments.get(name) is not None for name in needed) != 1:
        what = f"lr_scheduler_type: {schedule} takes either min_lr or min_lr_rate"
        return conflict(recipe, what, keys, "lr_scheduler_kwargs: {min_lr_rate: 0.1}")
    if schedule == "warmup_stable_decay" and arguments.get("num_decay_steps") is None:
        what = f"lr_scheduler_type: {schedule} needs num_decay_steps"
        return conflict(recipe, what, keys, "lr_scheduler_kwargs: {num_decay_steps: 100}")
    return None


# ---- evaluation and saving ----


@register
def evaluation_keys_need_evaluation(recipe: Recipe) -> RuleBreak | None:
    """Nothing is evaluated."""
    if recipe.get("eval_strategy") != "no":
        return None
    # Many recipes carry these along; where the data lies may stay when evaluation is switched off in so many words.
    carried = ["per_device_eval_batch_size", "dataset_test_split"]
    carried += ["eval_dataset_name"] if "eval_strategy" in recipe.values else []
    idle(recipe, "eval_strategy", carried, harmless=True)
    keys = ["eval_dataset_name", "eval_steps", "eval_delay", "eval_on_start"]
    keys += ["early_stopping_patience", "early_stopping_threshold"]
    return idle(recipe, "eval_strategy", keys, "eval_strategy: epoch, or steps")


@register
def best_model_is_evaluated_and_saved(recipe: Recipe) -> RuleBreak | None:
    """The best checkpoint is chosen among those that were both evaluated and saved."""
    evaluates, saves = recipe.get("eval_strategy"), recipe.get("save_strategy")
    if not recipe.get("load_best_model_at_end") and saves != "best":
        return None
    keys = ["eval_strategy", "save_strategy", "load_best_model_at_end"]
    key = "load_best_model_at_end" if recipe.get("load_best_model_at_end") else "save_strategy"
    if evaluates == "no":
        return conflict(recipe, f"{format_key(recipe, key)} without evaluation", keys, "eval_strategy: epoch", at=key)
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


@register
def early_stopping_follows_a_metric(recipe: Recipe) -> RuleBreak | None:
    """Whether an evaluation is an improvement is a question of one metric; load_best_model_at_end makes it the loss."""
    key, best, metric = "early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"
    if recipe.get(key) is None or recipe.get("eval_strategy") == "no":
        return None
    if not recipe.get(best) and not recipe.get(metric):
        return conflict(recipe, f"{format_key(recipe, key)} without a metric", [best, metric, key],
                        f"{best}: true, or {metric}: eval_loss", at=key)  # fmt: skip
    if not recipe.get(best):
        recipe.notes.append(
            f"{recipe.where(key)}: without {best}: true the result is the step at which early stopping ends the run, "
            "not the best one before it"
        )
    return None


# ---- data and batches ----


@register
def one_source_of_evaluation_rows(recipe: Recipe) -> RuleBreak | None:
    """Evaluation rows have one source: eval_dataset_name, test_split_size, or the test split of dataset_name."""
    keys = ["eval_dataset_name", "test_split_size"]
    if all(map(recipe.get, keys)):
        older, newer = sorted(keys, key=lambda key: recipe.layers.get(key, 0))
        if recipe.layers.get(older, 0) == recipe.layers.get(newer, 0):
            return conflict(recipe, "eval_dataset_name and test_split_size are both set", keys, OWN_SPLIT)
        idle(recipe, newer, [older])
    if recipe.get("eval_dataset_name"):
        if foreign := recipe.foreign_evaluation():  # may be meant, so it is no break
            key = "datasets" if recipe.get("datasets") else "dataset_name"
            recipe.notes.append(
                f"⚠ {recipe.where('eval_dataset_name')}: {foreign} came with other training data and is kept: "
                f"evaluation loss, best checkpoint and verdicts are about it, not about {format_key(recipe, key)} "
                f"({recipe.where(key)}); {OWN_ROWS}"
            )
        return None
    for key in ("test_split_size", "datasets"):
        if recipe.get(key):
            return idle(recipe, key, ["dataset_test_split"])
    return None


@register
def everything_trains_thoughts(recipe: Recipe) -> RuleBreak | None:
    """All tokens have a loss then, those of thoughts too."""
    key = "train_on_reasoning"
    others = [name for name in ("assistant_only_loss", "completion_only_loss") if recipe.values.get(name) is False]
    others += ["train_on"] if recipe.get("train_on") == "everything" else []
    if recipe.get(key) == "all" or not others:
        return None
    help = "train_on: all_turns" if others == ["train_on"] else f"remove {others[0]}"
    what = f"{format_key(recipe, key)} with {format_key(recipe, others[0])}"
    return conflict(recipe, what, [others[0], key], help, at=key)


@register
def one_template(recipe: Recipe) -> RuleBreak | None:
    """A conversation is rendered by one template."""
    keys = [key for key in ("chat_template", "chat_template_path", "prompt_template") if recipe.get(key)]
    return conflict(recipe, f"{' and '.join(keys)} are both set", keys, "keep one of them") if len(keys) > 1 else None


@register
def a_planned_micro_batch_needs_the_global_one(recipe: Recipe) -> RuleBreak | None:
    """The plan cuts the global batch as the memory allows: were it not fixed, the curve would follow the hardware."""
    if recipe.get("per_device_train_batch_size") != "auto":
        return None
    keys = ["per_device_train_batch_size", "global_batch_size"]
    if not recipe.get("global_batch_size"):
        return conflict(recipe, "per_device_train_batch_size: auto without global_batch_size", keys,
                        "global_batch_size: 8, say")  # fmt: skip
    if "gradient_accumulation_steps" in recipe.values:
        what = "gradient_accumulation_steps is set, and with per_device_train_batch_size: auto it follows"
        return conflict(recipe, what, [keys[0], "gradient_accumulation_steps"], "remove gradient_accumulation_steps")
    return None


CHECKS |= peft_rules.CHECKS
RULES = build_rules(CHECKS)
