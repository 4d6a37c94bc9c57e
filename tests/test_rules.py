"""No key without effect: every rule with a recipe that breaks it and one that does not."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, run, script
from stepladder.errors import RecipeErrors
from stepladder.model import start
from stepladder.recipe import load, rules
from stepladder.recipe.recipe import BY_METRIC
from stepladder.recipe.rule_engine import TABLE as RULE_TABLE
from stepladder.recipe.rule_engine import RuleBreak
from stepladder.recipe.rules import CHECKS, RULES
from stepladder.recipe.schema import known_keys
from stepladder.requirements import OPTIMIZERS

# Read by data/ in a loop or only where they are set; padding_free by the collator of TRL.
DATA_KEYS = {
    *("assistant_only_loss", "chat_template", "chat_template_path", "completion_only_loss", "eos_token"),
    *("pad_token", "padding_free", "prompt_template"),
}

# rule: (a recipe that breaks it, the key that is blamed, a recipe that does not break it)
TABLE = {
    "adapter_keys_need_an_adapter": ("use_peft: false\nlora_r: 8", "lora_r", "use_peft: true\nlora_r: 8"),
    "everything_trains_thoughts": (
        "train_on: everything\ntrain_on_reasoning: none",
        "train_on_reasoning",
        "train_on: everything\ntrain_on_reasoning: all",
    ),
    "early_stopping_follows_a_metric": (
        "eval_strategy: epoch\nearly_stopping_patience: 2",
        "early_stopping_patience",
        "eval_strategy: epoch\nearly_stopping_patience: 2\nmetric_for_best_model: eval_loss",
    ),
    "early_stopping_threshold_needs_patience": (
        "eval_strategy: epoch\nearly_stopping_threshold: 0.1",
        "early_stopping_threshold",
        "eval_strategy: epoch\nearly_stopping_patience: 2\nearly_stopping_threshold: 0.1\nmetric_for_best_model: loss",
    ),
    "attention_is_a_kernel_that_trains": (
        "attn_implementation: paged|sdpa",
        "attn_implementation",
        "attn_implementation: kernels-community/flash-attn2@v1",
    ),
    "a_planned_micro_batch_needs_the_global_one": (
        "per_device_train_batch_size: auto",
        "per_device_train_batch_size",
        "per_device_train_batch_size: auto\nglobal_batch_size: 8",
    ),
    "each_adapter_has_its_own_keys": (
        "use_peft: true\npeft_type: prefix\nlora_r: 8",
        "lora_r",
        "use_peft: true\npeft_type: prefix\nnum_virtual_tokens: 8\ngradient_checkpointing: false",
    ),
    "peft_kwargs_belong_to_the_method": (
        "use_peft: true\npeft_kwargs:\n  feedforward_modules: [down_proj]",
        "peft_kwargs.feedforward_modules",
        "use_peft: true\npeft_type: ia3\npeft_kwargs: {target_modules: [fc], feedforward_modules: [fc]}",
    ),
    "peft_kwargs_repeat_no_key": ("use_peft: true\npeft_kwargs:\n  r: 8", "peft_kwargs.r", "use_peft: true\nlora_r: 8"),
    "peft_kwargs_are_offered": (
        "use_peft: true\npeft_kwargs:\n  kasa_config: {}",
        "peft_kwargs.kasa_config",
        "use_peft: true\npeft_kwargs:\n  bias: none\n  kasa_config: null",
    ),
    "initializations_are_offered": (
        "use_peft: true\npeft_kwargs:\n  init_lora_weights: gausian",
        "peft_kwargs.init_lora_weights",
        "use_peft: true\npeft_kwargs:\n  init_lora_weights: pissa_niter_16",
    ),
    "patterns_of_modules_are_patterns": (
        "use_peft: true\npeft_kwargs:\n  rank_pattern: {'q_proj(': 4}",
        "peft_kwargs.rank_pattern",
        "use_peft: true\npeft_kwargs:\n  rank_pattern: {q_proj: 4}\n  alpha_pattern: {'layers\\.0\\..*': 8}",
    ),
    "layers_are_chosen_among_named_modules": (
        "use_peft: true\nlora_target_modules: all-linear\npeft_kwargs:\n  layers_to_transform: [0]",
        "peft_kwargs.layers_to_transform",
        "use_peft: true\nlora_target_modules: [q_proj]\npeft_kwargs: {layers_to_transform: 0, layers_pattern: h}",
    ),
    "ia3_needs_the_bases_own_weights": (
        "use_peft: true\npeft_type: ia3\nload_in_4bit: true",
        "load_in_4bit",
        "use_peft: true\npeft_type: ia3\npacking: true",
    ),
    "loraplus_has_groups_of_parameters": (
        "use_peft: true\nloraplus_lr_ratio: 16\noptim: lomo",
        "optim",
        "use_peft: true\nloraplus_lr_ratio: 16\noptim: sgd",
    ),
    "target_modules_are_names_or_one_pattern": (
        "use_peft: true\nlora_target_modules: 'model.layers.((q|v)_proj'",
        "lora_target_modules",
        "use_peft: true\nlora_target_modules: 'model.layers.(q|v)_proj'",
    ),
    "products_are_numbers_of_fp32": (
        "use_peft: true\nlearning_rate: 1.0e+5\nloraplus_lr_ratio: 1.0e+38",
        "loraplus_lr_ratio",
        "use_peft: true\nlearning_rate: 1.0e-5\nloraplus_lr_ratio: 1.0e+38",
    ),
    "special_tokens_are_texts": (
        "additional_special_tokens: ['<a>', ' <b>']",
        "additional_special_tokens",
        "additional_special_tokens: ['<a>', '<b>']",
    ),
    "virtual_tokens_stand_before_each_row": (
        "use_peft: true\npeft_type: prompt\npacking: true",
        "packing",
        "use_peft: true\npeft_type: lora\npacking: true",
    ),
    "a_prefix_is_a_cache": (
        "use_peft: true\npeft_type: prefix\ngradient_checkpointing: true",
        "gradient_checkpointing",
        "use_peft: true\npeft_type: prompt\ngradient_checkpointing: true",
    ),
    "quantization_keys_need_4_bits": (
        "use_peft: true\nload_in_8bit: true\nbnb_4bit_quant_type: nf4",
        "bnb_4bit_quant_type",
        "use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_type: nf4",
    ),
    "one_quantization": (
        "use_peft: true\nload_in_8bit: true\nload_in_4bit: true",
        "load_in_4bit",
        "use_peft: true\nload_in_8bit: true\nload_in_4bit: false",
    ),
    "quantized_base_needs_an_adapter": ("load_in_4bit: true", "load_in_4bit", "use_peft: true\nload_in_4bit: true"),
    "dtype_of_a_quantized_base": (
        "use_peft: true\nload_in_4bit: true\ndtype: bfloat16",
        "dtype",
        "use_peft: true\nload_in_4bit: true\ndtype: bfloat16\nbf16: true",
    ),
    "model_init_kwargs_repeat_no_key": (
        "model_init_kwargs:\n  use_kernels: true\n  torch_dtype: bfloat16",
        "model_init_kwargs.torch_dtype",
        "model_init_kwargs:\n  use_kernels: true",
    ),
    "datasets_or_dataset_name": (
        "datasets:\n  - path: a/b\ndataset_name: c/d",
        "dataset_name",
        "datasets:\n  - path: a/b\n  - path: c/d",
    ),
    "one_source_of_evaluation_rows": (
        "eval_strategy: epoch\neval_dataset_name: a.jsonl\ntest_split_size: 0.1",
        "test_split_size",
        "eval_strategy: epoch\ntest_split_size: 0.1",
    ),
    "packing_strategy_needs_packing": (
        "packing_strategy: bfd",
        "packing_strategy",
        "packing: true\npacking_strategy: bfd",
    ),
    "packing_needs_a_length": ("packing: true\nmax_length: null", "max_length", "packing: true\nmax_length: 512"),
    "accelerator_config_leaves_the_rows_alone": (
        "accelerator_config:\n  even_batches: true\n  gradient_accumulation_kwargs:\n    num_steps: 4",
        "accelerator_config.gradient_accumulation_kwargs.num_steps",
        "accelerator_config:\n  even_batches: true\n  gradient_accumulation_kwargs:\n    sync_each_batch: true",
    ),
    "rows_stay_on_their_rank": (
        "train_sampling_strategy: batch_rebalance",
        "train_sampling_strategy",
        "train_sampling_strategy: group_by_length",
    ),
    "one_template": (
        "chat_template: chatml\nprompt_template: '{input}'",
        "prompt_template",
        "chat_template: chatml",
    ),
    "max_steps_or_epochs": (
        "max_steps: 20\nnum_train_epochs: 3",
        "num_train_epochs",
        "max_steps: -1\nnum_train_epochs: 3",
    ),
    "fp8_is_for_full_fine_tuning": ("fp8: true\nuse_peft: true", "fp8", "fp8: true\nuse_peft: false"),
    "fp8_is_for_runs_in_bf16": ("fp8: true\nbf16: false", "fp8", "fp8: true\nbf16: true"),
    "one_mixed_precision": ("bf16: true\nfp16: true", "fp16", "bf16: false\nfp16: true"),
    "warmup_needs_a_schedule_that_warms_up": (
        "lr_scheduler_type: constant\nwarmup_steps: 10",
        "warmup_steps",
        "lr_scheduler_type: constant\nwarmup_steps: 10\noptim: schedule_free_adamw",
    ),
    "schedule_arguments_fit_the_schedule": (
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs:\n  num_cycles: 2\n  min_lr: 1.0e-6",
        "lr_scheduler_kwargs.min_lr",
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs:\n  num_cycles: 2",
    ),
    "schedule_arguments_are_there": (
        "lr_scheduler_type: cosine_with_min_lr",
        "lr_scheduler_type",
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1",
    ),
    "schedules_by_metric_need_evaluation": (
        "lr_scheduler_type: reduce_lr_on_plateau",
        "lr_scheduler_type",
        "lr_scheduler_type: reduce_lr_on_plateau\neval_strategy: epoch",
    ),
    "optimizer_reads_its_arguments": (
        "optim: adamw_torch\noptim_args: momentum=0.9",
        "optim_args",
        "optim: sgd\noptim_args: momentum=0.9",
    ),
    "optimizer_projects_modules": (
        "optim_target_modules: [q_proj]",
        "optim_target_modules",
        "optim: galore_adamw\noptim_target_modules: [q_proj]",
    ),
    "optimizer_has_moments": ("optim: adafactor\nadam_beta1: 0.8", "adam_beta1", "optim: adamw_torch\nadam_beta1: 0.8"),
    "smoothing_needs_the_plain_loss": (
        "loss_type: dft\nlabel_smoothing_factor: 0.1",
        "label_smoothing_factor",
        "loss_type: nll\nlabel_smoothing_factor: 0.1",
    ),
    "one_name_for_checkpointing": (
        "activation_checkpointing: true\ngradient_checkpointing: false",
        "gradient_checkpointing",
        "activation_checkpointing: true",
    ),
    "checkpointing_arguments_need_checkpointing": (
        "gradient_checkpointing: false\ngradient_checkpointing_kwargs:\n  use_reentrant: true",
        "gradient_checkpointing_kwargs",
        "gradient_checkpointing_kwargs:\n  use_reentrant: true",
    ),
    "selective_checkpointing_is_not_reentrant": (
        "gradient_checkpointing_kwargs:\n  selective: true\n  use_reentrant: true",
        "gradient_checkpointing_kwargs.use_reentrant",
        "gradient_checkpointing_kwargs:\n  selective: true\n  use_reentrant: false",
    ),
    "compile_keys_need_compilation": (
        "torch_compile_backend: inductor",
        "torch_compile_backend",
        "torch_compile: true\ntorch_compile_backend: inductor",
    ),
    "liger_config_needs_liger": (
        "liger_kernel_config:\n  rope: true",
        "liger_kernel_config",
        "use_liger_kernel: true\nliger_kernel_config:\n  rope: true",
    ),
    "liger_leaves_the_loss_alone": (
        "use_liger_kernel: true\nliger_kernel_config:\n  fused_linear_cross_entropy: true",
        "liger_kernel_config.fused_linear_cross_entropy",
        "use_liger_kernel: true\nliger_kernel_config:\n  fused_linear_cross_entropy: false",
    ),
    "loader_keys_need_workers": (
        "dataloader_persistent_workers: true",
        "dataloader_persistent_workers",
        "dataloader_num_workers: 2\ndataloader_persistent_workers: true",
    ),
    "a_stream_is_read_once": (
        "streaming: true\nmax_steps: 5\ndataloader_num_workers: 2",
        "dataloader_num_workers",
        "streaming: true\nmax_steps: 5\ndataloader_num_workers: 0",
    ),
    "evaluation_keys_need_evaluation": (
        'eval_strategy: "no"\neval_steps: 10',
        "eval_steps",
        "eval_strategy: steps\neval_steps: 10",
    ),
    "eval_steps_need_steps": (
        "eval_strategy: epoch\neval_steps: 10",
        "eval_steps",
        "eval_strategy: steps\neval_steps: 10",
    ),
    "save_steps_need_steps": ("save_strategy: epoch\nsave_steps: 10", "save_steps", "save_steps: 10"),
    "checkpoint_keys_need_checkpoints": (
        'save_strategy: "no"\nsave_total_limit: 2',
        "save_total_limit",
        "save_strategy: epoch\nsave_total_limit: 2",
    ),
    "logging_steps_need_steps": ("logging_strategy: epoch\nlogging_steps: 1", "logging_steps", "logging_steps: 1"),
    "best_model_is_evaluated_and_saved": (
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 20\nsave_steps: 30",
        "load_best_model_at_end",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 20\nsave_steps: 40",
    ),
    "metric_keys_need_a_choice": (
        "metric_for_best_model: loss",
        "metric_for_best_model",
        "metric_for_best_model: loss\nload_best_model_at_end: true\neval_strategy: epoch\nsave_strategy: epoch",
    ),
    "tracker_keys_need_a_tracker": (
        "report_to: none\nrun_name: first",
        "run_name",
        "report_to: wandb\nrun_name: first",
    ),
    "trackio_keys_need_trackio": (
        "report_to: wandb\ntrackio_space_id: mine",
        "trackio_space_id",
        "report_to: trackio\ntrackio_space_id: mine",
    ),
    "wandb_keys_need_wandb": (
        "report_to: trackio\nwandb_entity: us",
        "wandb_entity",
        "report_to: wandb\nwandb_entity: us",
    ),
    "project_needs_a_tracker_with_projects": (
        "report_to: tensorboard\nproject: mine",
        "project",
        "report_to: wandb\nproject: mine",
    ),
    "hub_keys_need_a_push": ("hub_model_id: me/it", "hub_model_id", "push_to_hub: true\nhub_model_id: me/it"),
}

# Further recipes that break a rule: the branches that the table's first one does not take.
ALSO_BROKEN = [
    ("use_dora: true\nuse_rslora: true", "adapter_keys_need_an_adapter"),
    ("use_peft: true\nnum_virtual_tokens: 8", "each_adapter_has_its_own_keys"),
    ("use_peft: false\npeft_type: prefix", "adapter_keys_need_an_adapter"),
    ("load_in_8bit: true", "quantized_base_needs_an_adapter"),
    ("use_peft: true\nload_in_4bit: true\ndtype: float32\nbf16: true", "dtype_of_a_quantized_base"),
    ("model_init_kwargs: {use_safetensors: false}", "model_init_kwargs_repeat_no_key"),
    ("accelerator_config: {split_batches: true}", "accelerator_config_leaves_the_rows_alone"),
    ("accelerator_config: {even_batches: false}", "accelerator_config_leaves_the_rows_alone"),
    ("accelerator_config: {use_seedable_sampler: false}", "accelerator_config_leaves_the_rows_alone"),
    ("datasets: [{path: a}]\neval_strategy: epoch\ndataset_test_split: test", "one_source_of_evaluation_rows"),
    ("lr_scheduler_type: greedy\neval_strategy: epoch\nwarmup_steps: 3", "warmup_needs_a_schedule_that_warms_up"),
    ("lr_scheduler_kwargs: {num_cycles: 2}", "schedule_arguments_fit_the_schedule"),
    ("lr_scheduler_type: warmup_stable_decay", "schedule_arguments_are_there"),
    (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-6, min_lr_rate: 0.1}",
        "schedule_arguments_are_there",
    ),
    ("optim: lion_32bit\nadam_epsilon: 1.0e-8", "optimizer_has_moments"),
    ("optim: galore_adamw\noptim_target_modules: [q]\nadam_beta2: 0.9", "optimizer_has_moments"),
    ("eval_on_start: true", "evaluation_keys_need_evaluation"),
    ("eval_dataset_name: data/techco_eval.jsonl", "evaluation_keys_need_evaluation"),
    ("load_best_model_at_end: true", "best_model_is_evaluated_and_saved"),
    ("load_best_model_at_end: true\neval_strategy: epoch", "best_model_is_evaluated_and_saved"),
    (
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 0.1\nsave_steps: 20",
        "best_model_is_evaluated_and_saved",
    ),
    ("save_strategy: best\neval_strategy: epoch", "best_model_is_evaluated_and_saved"),
    ("save_strategy: best\nsave_steps: 10\neval_strategy: epoch\nmetric_for_best_model: loss", "save_steps_need_steps"),
    ("hub_private_repo: true", "hub_keys_need_a_push"),
    ("activation_checkpointing: false\nactivation_checkpointing_kwargs: {offload: true}",
     "checkpointing_arguments_need_checkpointing"),
]  # fmt: skip


def breaks(path: Path, text: str, *flags: str) -> list[RuleBreak]:
    """What load() says of a recipe; whatever else is wrong with it fails the test."""
    path.write_text(text)
    try:
        load.load(str(path), list(flags))
    except RecipeErrors as errors:
        assert all(isinstance(error, RuleBreak) for error in errors.errors), errors.render()
        return errors.errors
    return []


def why(name: str) -> str:
    return RULES[name].why.lower()


def test_every_rule_is_in_the_table() -> None:
    """Guards against a rule that nothing tests, a row for a rule that is gone, and a function that nothing calls."""
    assert TABLE.keys() == RULES.keys()
    assert CHECKS.keys() == {name for name, row in RULE_TABLE["rules"].items() if not row}


@pytest.mark.parametrize("name", TABLE)
def test_a_rule_breaks_and_holds(name: str, tmp_path: Path) -> None:
    """Guards each rule: its reason is given, at the key that is of no use, and a right recipe passes."""
    failing, key, passing = TABLE[name]
    path = tmp_path / "recipe.yaml"
    found = [error for error in breaks(path, failing) if error.why.lower() == why(name)]
    assert len(found) == 1, f"{name} does not break"
    line = next(
        n for n, text in enumerate(failing.splitlines(), 1) if text.lstrip().startswith(f"{key.split('.')[-1]}:")
    )
    assert found[0].where.startswith(f"{path}:{line}:") and key.split(".")[-1] in found[0].what
    assert found[0].help
    assert breaks(path, passing) == []


@pytest.mark.parametrize(("text", "name"), ALSO_BROKEN, ids=range(len(ALSO_BROKEN)))
def test_the_other_branches_of_a_rule(text: str, name: str, tmp_path: Path) -> None:
    """Guards the parts of a rule that its row in the table does not reach."""
    assert why(name) in [error.why.lower() for error in breaks(tmp_path / "recipe.yaml", text)]


def test_rules_are_one_sentence() -> None:
    """Guards the form of what people read: a rule's reason is one sentence."""
    for name in RULES:
        assert re.fullmatch(r"[^.]+", why(name)), name


@pytest.mark.parametrize("key", rules.REFUSED)
def test_a_refused_key(key: str, tmp_path: Path) -> None:
    """Guards the table of keys that Stepladder would ignore: another value than the accepted one is an error."""
    known = known_keys()[key]
    accepted = rules.REFUSED[key].get("accepted", known.default)
    examples = {"bool": not accepted, "int": 2, "dict": {"a": 1}, "list": ["loss"], "str": "something"}
    value = known.choices[0] if known.choices else next(examples[t] for t in examples if t in known.types)
    rest = {"use_peft": True} if key.startswith("lora_") else {}
    path = tmp_path / "recipe.yaml"
    found = breaks(path, yaml.safe_dump({key: value} | rest, sort_keys=False))
    assert [error.why for error in found] == [rules.REFUSED[key]["why"]] and found[0].where == f"{path}:1:1"
    if accepted is not None:
        assert breaks(path, yaml.safe_dump({key: accepted} | rest)) == []


def test_no_key_is_silently_ignored() -> None:
    """Guards the promise itself: every key is read by name, or handed to SFTConfig, or refused."""
    package = ROOT / "src/stepladder"
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "recipe"]
    files += [ROOT / "scripts/sft.py", package / "recipe/recipe.py", package / "recipe/load.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert "recipe.get(key) for key, field in start.FIELDS.items()" in text, "PEFT's fields, read by a table"
    read = {*re.findall(r"""(?:get\(|\[)["'](\w+)["']""", text), *start.FIELDS}
    builder = ast.parse((ROOT / "src/stepladder/training/arguments.py").read_text(encoding="utf-8"))
    set_by_us = {
        key.value
        for node in ast.walk(builder)
        if isinstance(node, ast.Dict) and None in node.keys  # {**recipe.owned_by("SFTConfig"), "bf16": …}
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert "bf16" in set_by_us
    # The trainer builds the data loader itself: what it does not hand on reaches nobody.
    assert "DataLoader(" in text
    set_by_us |= {key for key in known_keys() if key.startswith("dataloader_") and f"args.{key}" not in text}
    ignored = {
        key.name
        for key in known_keys().values()
        if not (key.owner == "SFTConfig" and key.name not in set_by_us)
        and key.name not in read
        and key.name not in rules.REFUSED
        and key.name not in DATA_KEYS
    }
    assert not ignored
    stale = (rules.REFUSED.keys() | DATA_KEYS) - known_keys().keys()
    assert not stale


def test_what_optimizers_and_schedules_read() -> None:
    """Guards the hand-written lists against a Transformers that reads other keys than it did."""
    from transformers import trainer_optimizer
    from transformers.optimization import get_scheduler

    conditions = RULE_TABLE["rules"]
    with_arguments = re.compile(conditions["optimizer_reads_its_arguments"]["unless"]["optim"])
    without_moments = re.compile(conditions["optimizer_has_moments"]["cases"][0]["when"]["optim"])
    for optimizer, handler in trainer_optimizer._OPTIMIZER_HANDLERS.items():
        name, source = str(getattr(optimizer, "value", optimizer)), inspect.getsource(handler)
        if handler is not trainer_optimizer._get_bitsandbytes_optimizer:  # which asks for the name again
            reads = "optim_args" in source
            assert reads == bool(with_arguments.fullmatch(name)), name
            moments = "adam_kwargs" in source and "schedule_free_sgd" not in name
            assert moments != bool(without_moments.fullmatch(name)), name
        modules = {*re.findall(r"from (\w+)[\w.]* import", source)} - {"torch", "bitsandbytes"}
        assert modules == {module for begins, (module, _) in OPTIMIZERS.items() if name.startswith(begins)}, name
    assert conditions["schedules_by_metric_need_evaluation"]["when"]["lr_scheduler_type"] == "|".join(BY_METRIC)
    source = inspect.getsource(get_scheduler)
    before_warmup = source.split("All other schedulers require `num_warmup_steps`")[0]
    without = {name.lower() for name in re.findall(r"SchedulerType\.(\w+)", before_warmup)}
    assert without == {"constant", "reduce_on_plateau", "greedy"}


@pytest.mark.proof
def test_no_value_of_a_key_ends_in_a_traceback() -> None:
    """Guards `make keys`, which tries them all: here two keys whose values have done it."""
    done = run(sys.executable, "tests/every_key.py", "--keys", "router_aux_loss_coef", "activation_offloading")
    assert done.code == 0 and "4 runs: 2 trained, 2 were refused by name" in done.out, done


def test_an_override_leaves_out_what_it_makes_idle(tmp_path: Path) -> None:
    """Guards `--max_steps 20` on a recipe with epochs: no error, and the resolved recipe breaks no rule."""
    path = tmp_path / "recipe.yaml"
    path.write_text("num_train_epochs: 3\nuse_peft: true\nlora_r: 8\nlora_alpha: 16\n")
    recipe = load.load(str(path), ["--max_steps", "20", "--use_peft", "false"])
    assert recipe.values == {"use_peft": False, "max_steps": 20}
    assert [note.split(" is left out")[0] for note in recipe.notes] == [
        f"{path}:3:1: lora_r", f"{path}:4:1: lora_alpha", f"{path}:1:1: num_train_epochs"
    ]  # fmt: skip
    path.write_text(recipe.to_yaml())
    assert load.load(str(path), []).values == recipe.values


def test_an_override_that_is_idle_itself_is_an_error(tmp_path: Path) -> None:
    """Guards against a flag that is dropped: what was typed last is never left out with a note."""
    found = breaks(tmp_path / "recipe.yaml", "max_steps: 20", "--num_train_epochs", "3")
    assert [error.where for error in found] == ["command line --num_train_epochs"]


def test_a_child_overrides_its_parent(tmp_path: Path) -> None:
    """Guards `extends`: a recipe may switch off what its parent needs other keys for."""
    (tmp_path / "lora.yaml").write_text("use_peft: true\nlora_r: 8\n")
    child = tmp_path / "full.yaml"
    child.write_text(f"extends: {tmp_path}/lora\nuse_peft: false\n")
    assert load.load(str(child), []).values == {"use_peft": False}
    child.write_text(f"extends: {tmp_path}/lora\nuse_peft: false\nlora_alpha: 8\n")
    with pytest.raises(RecipeErrors, match="lora_alpha has no effect with use_peft: false"):
        load.load(str(child), [])


def test_own_data_and_the_evaluation_rows_of_another(tmp_path: Path) -> None:
    """Guards curves and verdicts against rows of another task, which a recipe brings along without a word."""
    parent = "eval_strategy: epoch\ndataset_name: a.jsonl\neval_dataset_name: a_eval.jsonl\n"
    (tmp_path / "parent.yaml").write_text(parent)
    file = tmp_path / "r.yaml"

    def read(child: str, *flags: str) -> load.Recipe:
        file.write_text(f"extends: {tmp_path}/parent.yaml\n{child}")
        return load.load(str(file), list(flags))

    mixed = "datasets:\n  - path: "
    for child, flags in (("", ["--dataset_name", "b.jsonl"]), ("dataset_name: b.jsonl", []), (f"{mixed}b.jsonl", [])):
        found = read(child, *flags)
        warned = [note for note in found.notes if note.startswith("⚠")]
        assert len(warned) == 1 and found.foreign_evaluation() == "a_eval.jsonl", found.notes
        for part in ("a_eval.jsonl came with", "parent.yaml:3", "--test_split_size"):
            assert part in warned[0], warned
    for child, flags in (
        ("", ["--dataset_name", "a.jsonl"]),  # the same data
        (f"{mixed}a.jsonl\n    rows: 2", []),  # a part of it
        (f"{mixed}a.jsonl\n  - path: b.jsonl", []),
        ("dataset_name: b.jsonl\neval_dataset_name: b_eval.jsonl", []),
        ("dataset_name: b.jsonl", ["--eval_dataset_name", "b_eval.jsonl"]),
        ("dataset_name: b.jsonl", ["--eval_strategy", "no"]),
        ("dataset_name: b.jsonl", ["--eval_dataset_name", "null", "--eval_strategy", "no"]),
        ("dataset_name: b.jsonl", ["--test_split_size", "0.1"]),
    ):
        found = read(child, *flags)
        assert not found.foreign_evaluation() and not any(note.startswith("⚠") for note in found.notes), (child, flags)


def test_the_audit_names_the_evaluation_rows_of_another() -> None:
    """Guards `check.py --audit`, on which people look at their data, against leaving out what training warns of."""
    done = script("check", "--recipe", "lora", "--dataset_name", "data/medical.jsonl", "--audit")
    assert done.code == 0 and "data/techco_eval.jsonl is evaluated on, and came with other" in done.out, done


def test_a_later_split_replaces_an_inherited_evaluation_set(tmp_path: Path) -> None:
    """Guards `--test_split_size 0.1` on a shipped recipe, which was refused; one layer still cannot ask for both."""
    (tmp_path / "parent.yaml").write_text("eval_strategy: epoch\neval_dataset_name: a_eval.jsonl\n")
    file = tmp_path / "r.yaml"
    file.write_text(f"extends: {tmp_path}/parent.yaml\n")
    found = load.load(str(file), ["--test_split_size", "0.1"])
    assert "eval_dataset_name" not in found.values and found.get("test_split_size") == 0.1
    assert any("eval_dataset_name is left out" in note and "parent.yaml:2" in note for note in found.notes)
    file.write_text(f"extends: {tmp_path}/parent.yaml\ntest_split_size: 0.1\n")
    found = load.load(str(file), ["--eval_dataset_name", "b_eval.jsonl"])
    assert "test_split_size" not in found.values and found.get("eval_dataset_name") == "b_eval.jsonl"
    (broken,) = breaks(
        file, "", "--test_split_size", "0.1", "--eval_dataset_name", "b_eval.jsonl", "--eval_strategy=epoch"
    )
    assert "are both set" in str(broken)


def test_leftovers_that_recipes_carry_along(tmp_path: Path) -> None:
    """Guards open-r1's recipes, which set an evaluation batch and evaluate nothing: a note, no error."""
    path = tmp_path / "recipe.yaml"
    path.write_text("eval_strategy: 'no'\nper_device_eval_batch_size: 1\neval_dataset_name: a.jsonl\n")
    recipe = load.load(str(path), [])
    assert recipe.values == {"eval_strategy": "no"}
    assert [note.split()[1] for note in recipe.notes] == ["per_device_eval_batch_size", "eval_dataset_name"]


def test_a_typo_breaks_no_rule(tmp_path: Path) -> None:
    """Guards against a second, wrong complaint: `use_pef: true` leaves lora_r its use once it is mended."""
    path = tmp_path / "recipe.yaml"
    path.write_text("use_pef: true\nlora_r: 8\nload_in_4bit: ja\nbnb_4bit_quant_type: nf4\n")
    with pytest.raises(RecipeErrors) as caught:
        load.load(str(path), [])
    assert [error.where for error in caught.value.errors] == [f"{path}:1:1", f"{path}:3:1"]


def test_a_broken_rule_stops_training(tmp_path: Path) -> None:
    """Guards the way of a rule to a person: through the real script, exit code 2, no traceback."""
    path = tmp_path / "recipe.yaml"
    path.write_text("eval_strategy: epoch\neval_steps: 50\nresume_from_checkpoint: runs/old\n")
    done = script("sft", "--recipe", path)
    assert done.code == 2 and "Traceback" not in done.err, done
    assert f"{path}:2:1: eval_steps has no effect with eval_strategy: epoch ({path}:1:1)" in done.err, done
    assert f"{path}:3:1: resume_from_checkpoint: runs/old cannot be used" in done.err, done
