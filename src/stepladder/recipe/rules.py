"""No key without effect: what a recipe's keys need of each other, one named rule a function.

A rule's docstring is the reason that a person reads. Where a key lost its use because the command
line (or a recipe that extends another) set a different one, nobody made a mistake: it is left out
with a note, so that `--max_steps 20` works on any recipe.
"""

from __future__ import annotations

from stepladder.recipe import model_rules, optimizer_rules, outcome_rules  # noqa: F401 - registers their rules
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.ruling import RULES, RuleBreak, conflict, idle, rule, shown
from stepladder.recipe.schema import known_keys

AT_LAUNCH = "the strategy is chosen at launch, so that one recipe runs under all of them"
USE_LAUNCHER = "accelerate launch --config_file accelerate_configs/zero3.yaml (or fsdp.yaml, zero2.yaml …)"
FIXED_BATCH = "per_device_train_batch_size: a smaller one, and global_batch_size keeps the curve"
OWN_LOADER = "rows come in an order of their own, the same on any number of ranks"
OWN_SPLIT = "eval_dataset_name: null holds a part of the training rows out; or no test_split_size"
OWN_ROWS = "--eval_dataset_name FILE, --test_split_size 0.1 to hold out a part of your own rows, or --eval_strategy no"
LOSS_ONLY = "an evaluation here computes the loss and nothing else"

# Keys of TRL and Transformers that would change nothing here, or break a promise: why, and the way
# out where it is not to remove them. Their default says what happens anyway and is accepted.
REFUSED: dict[str, tuple[str, str]] = {
    "auto_find_batch_size": ("the micro-batch is a part of the global batch, which decides the curve", FIXED_BATCH),
    "average_tokens_across_devices": ("the curve would depend on the number of ranks", ""),
    "batch_eval_metrics": (LOSS_ONLY, ""),
    "bf16_full_eval": ("evaluation runs while the model trains, in training's precision", ""),
    "dataloader_drop_last": ("an epoch's last step is filled up with rows that train nothing", ""),
    "dataloader_in_order": (OWN_LOADER, ""),
    "dataloader_multiprocessing_context": (OWN_LOADER, ""),
    "dataset_kwargs": ("rows reach TRL tokenized and labelled: it prepares nothing", ""),
    "deepspeed": (AT_LAUNCH, USE_LAUNCHER),
    "enable_jit_checkpoint": ("each rank decides by itself when to save, and ranks that differ hang or break it", ""),
    "eval_accumulation_steps": (LOSS_ONLY, ""),
    "eval_do_concat_batches": (LOSS_ONLY, ""),
    "eval_use_gather_object": (LOSS_ONLY, ""),
    "fp16_full_eval": ("evaluation runs while the model trains, in training's precision", ""),
    "fsdp": (AT_LAUNCH, USE_LAUNCHER),
    "fsdp_config": (AT_LAUNCH, USE_LAUNCHER),
    "hub_token": ("it would stand in run.json for everyone to read", "hf auth login, or export HF_TOKEN=…"),
    "ignore_bias_buffers": ("nothing in TRL reads it", ""),
    "ignore_data_skip": ("a resumed run would see other rows than the one it continues", ""),
    "include_for_metrics": (LOSS_ONLY, ""),
    "length_column_name": ("lengths are counted from the tokens", ""),
    "logging_nan_inf_filter": ("a loss that is no number is shown, not replaced by the last one that was", ""),
    "lora_task_type": ("only causal language models are trained", ""),
    "parallelism_config": (AT_LAUNCH, USE_LAUNCHER),
    "prediction_loss_only": (LOSS_ONLY, ""),
    "remove_unused_columns": ("a batch holds tokens and labels, whatever the rows hold", ""),
    "resume_from_checkpoint": ("Transformers' train() never reads it: the run would start anew without a word", ""),
    "skip_memory_metrics": ("peak memory is in run.json always, without the profiler that slows training", ""),
    "truncation_mode": ("rows are cut at their end, so that none loses its question", ""),
}
ACCEPTED = {"logging_nan_inf_filter": False}  # what happens here, where it is not the library's default

# Not ruled here: data/ reads them in a loop or only where they are set (`templates.prepare`,
# `render.mode`), and padding_free is TRL's collator's.
DATA_KEYS = {
    *("assistant_only_loss", "chat_template", "chat_template_path", "completion_only_loss", "eos_token"),
    *("pad_token", "padding_free", "prompt_template"),
}

WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor")


def check(recipe: Recipe) -> list[RuleBreak]:
    """All rules that the recipe breaks. Keys that an override made idle are taken out of it, with a note."""
    broken = [found for rule in RULES.values() if (found := rule(recipe))]
    for key, (why, help) in REFUSED.items():
        accepted = ACCEPTED.get(key, known_keys()[key].default)
        if key in recipe.values and recipe.values[key] not in (accepted, None):
            # a token is not repeated: the message goes into a job's log
            what = f"{key if key == 'hub_token' else shown(recipe, key)} cannot be used"
            out = help or "remove it"
            broken.append(RuleBreak(what, keys=[key], why=why, help=out, where=recipe.where(key)))
    return broken


# ---- data ----


@rule
def datasets_or_dataset_name(recipe: Recipe) -> RuleBreak | None:
    """The list of data sets is the whole of the training data, each with its own split and configuration."""
    keys = ["dataset_name", "dataset_config", "dataset_train_split"]
    return idle(recipe, "datasets", keys, "make it an entry of datasets") if recipe.get("datasets") else None


@rule
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
                f"evaluation loss, best checkpoint and verdicts are about it, not about {shown(recipe, key)} "
                f"({recipe.where(key)}); {OWN_ROWS}"
            )
        return None
    for key in ("test_split_size", "datasets"):
        if recipe.get(key):
            return idle(recipe, key, ["dataset_test_split"])
    return None


@rule
def one_template(recipe: Recipe) -> RuleBreak | None:
    """A conversation is rendered by one template."""
    keys = [key for key in ("chat_template", "chat_template_path", "prompt_template") if recipe.get(key)]
    return conflict(recipe, f"{' and '.join(keys)} are both set", keys, "keep one of them") if len(keys) > 1 else None


@rule
def packing_strategy_needs_packing(recipe: Recipe) -> RuleBreak | None:
    """Every row is a sequence of its own."""
    packs = recipe.get("packing") or recipe.get("eval_packing")
    return None if packs else idle(recipe, "packing", ["packing_strategy"], "packing: true")


@rule
def packing_needs_a_length(recipe: Recipe) -> RuleBreak | None:
    """Rows are packed into sequences of max_length tokens."""
    if recipe.get("packing") and recipe.get("max_length") is None:
        return conflict(recipe, "packing: true with max_length: null", ["packing", "max_length"], "max_length: 2048")
    return None


# ---- rows ----


@rule
def accelerator_config_leaves_the_rows_alone(recipe: Recipe) -> RuleBreak | None:
    """Which rows a step trains is settled by the global batch and the seed alone."""
    config = recipe.get("accelerator_config") or {}
    for name, used in {
        "even_batches": config.get("even_batches") is False,
        "gradient_accumulation_kwargs.num_steps": (config.get("gradient_accumulation_kwargs") or {}).get("num_steps"),
        "split_batches": config.get("split_batches"),
        "use_seedable_sampler": config.get("use_seedable_sampler") is False,
    }.items():
        if used:
            at, help = f"accelerator_config.{name}", "remove it; global_batch_size sets the global batch"
            return conflict(recipe, f"{at} cannot be used", ["accelerator_config"], help, at=at)
    return None


@rule
def rows_stay_on_their_rank(recipe: Recipe) -> RuleBreak | None:
    """Rows that are dealt out by length would make the curve depend on the number of ranks."""
    key = "train_sampling_strategy"
    if recipe.get(key) == "batch_rebalance":
        return conflict(recipe, f"{shown(recipe, key)} cannot be used", [key], f"{key}: group_by_length")
    return None


# ---- training ----


@rule
def max_steps_or_epochs(recipe: Recipe) -> RuleBreak | None:
    """A positive max_steps ends the run, however many epochs that is."""
    return idle(recipe, "max_steps", ["num_train_epochs"], "max_steps: -1") if recipe.get("max_steps") > 0 else None


@rule
def one_mixed_precision(recipe: Recipe) -> RuleBreak | None:
    """Training computes in one format."""
    if recipe.get("fp16") and recipe.get("bf16") is True:
        return conflict(recipe, "bf16 and fp16 are both true", ["bf16", "fp16"], "bf16: false, or fp16: false")
    return None


@rule
def smoothing_needs_the_plain_loss(recipe: Recipe) -> RuleBreak | None:
    """TRL smooths the labels of the plain loss only."""
    smooths = recipe.get("loss_type") != "dft"
    return None if smooths else idle(recipe, "loss_type", ["label_smoothing_factor"], "loss_type: nll")


@rule
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


@rule
def one_name_for_checkpointing(recipe: Recipe) -> RuleBreak | None:
    """It is Transformers' older name for activation_checkpointing, which wins."""
    for end in ("", "_kwargs"):
        if recipe.get(f"activation_checkpointing{end}") is not None:
            found = idle(recipe, f"activation_checkpointing{end}", [f"gradient_checkpointing{end}"])
            if found:
                return found
    return None


@rule
def checkpointing_arguments_need_checkpointing(recipe: Recipe) -> RuleBreak | None:
    """No activation is recomputed."""
    newer = recipe.get("activation_checkpointing") is not None
    key = "activation_checkpointing" if newer else "gradient_checkpointing"
    keys = ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"]
    return None if recipe.get(key) else idle(recipe, key, keys, f"{key}: true")


@rule
def selective_checkpointing_is_not_reentrant(recipe: Recipe) -> RuleBreak | None:
    """Selective checkpointing keeps some activations, which reentrant checkpointing cannot."""
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        block = recipe.get(key) or {}
        if block.get("selective") and block.get("use_reentrant"):
            what = f"{key}: selective and use_reentrant are both true"
            return conflict(recipe, what, [key], "use_reentrant: false", at=f"{key}.use_reentrant")
    return None


@rule
def compile_keys_need_compilation(recipe: Recipe) -> RuleBreak | None:
    """It would be switched on for them, without a word, by Transformers."""
    keys = ["torch_compile_backend", "torch_compile_mode"]
    return None if recipe.get("torch_compile") else idle(recipe, "torch_compile", keys, "torch_compile: true")


@rule
def liger_config_needs_liger(recipe: Recipe) -> RuleBreak | None:
    """It chooses among Liger's kernels."""
    if recipe.get("use_liger_kernel"):
        return None
    return idle(recipe, "use_liger_kernel", ["liger_kernel_config"], "use_liger_kernel: true")


@rule
def liger_leaves_the_loss_alone(recipe: Recipe) -> RuleBreak | None:
    """TRL computes the loss without logits itself, and refuses Liger's."""
    at = "liger_kernel_config.fused_linear_cross_entropy"
    if (recipe.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        return conflict(recipe, f"{at}: true", ["liger_kernel_config"], "remove it", at=at)
    return None


@rule
def loader_keys_need_workers(recipe: Recipe) -> RuleBreak | None:
    """Without worker processes the rows are read in the training process itself."""
    if recipe.get("dataloader_num_workers"):
        return None
    return idle(recipe, "dataloader_num_workers", WORKERS, "dataloader_num_workers: 2")


@rule
def a_stream_is_read_once(recipe: Recipe) -> RuleBreak | None:
    """Each worker process would read the whole stream, and its rows be trained once for each."""
    key = "dataloader_num_workers"
    for stream in ("streaming", "dataset_streaming"):
        if recipe.get(key) and recipe.get(stream):
            return conflict(recipe, f"{shown(recipe, key)} with {stream}: true", [stream, key], f"{key}: 0", at=key)
    return None
