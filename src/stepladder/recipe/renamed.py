"""Keys that TRL, Transformers, alignment-handbook and open-r1 once had, in today's words.

A recipe that people already have runs as it is: a renamed key is translated, a key that decides
nothing any more is left out, each with a note; a key whose feature is gone is an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from stepladder.errors import RecipeError
from stepladder.recipe.convert import Pairs, Source, constructed, mapping, unknown_key

RENAMED = {
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",
    "max_seq_length": "max_length",
    "model_name": "model_name_or_path",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "preprocessing_num_workers": "dataset_num_proc",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "seq_length": "max_length",
    "text_column": "dataset_text_field",
    "torch_dtype": "dtype",
    "use_liger": "use_liger_kernel",
}

RENAMED_VALUES = {
    ("loss_type", "chunked_nll"): "nll",
    ("optim", "adamw_apex_fused"): "adamw_torch_fused",
    ("optim", "adamw_hf"): "adamw_torch",
    ("packing_strategy", "bfd-requeue"): "bfd_split",
    ("packing_strategy", "ffd"): "bfd",
}


@dataclass(frozen=True)
class Gone:
    """A key without a successor. It is left out where its value is `harmless` (None: any is), else refused."""

    why: str
    harmless: tuple[Any, ...] | None = None
    help: str = "remove it"


OPEN_R1 = "it belongs to open-r1's own jobs on its own cluster"
LAUNCH = "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes N scripts/sft.py …"
LAUNCHER = Gone("how many ranks run, and where, is said to the launcher", (), LAUNCH)
TORCH_AMP = Gone("mixed precision is PyTorch's own today")
ESTIMATE = Gone("packing counts the tokens themselves and needs no estimate")

GONE = {
    # ---- what the script or the launcher does ----
    "accelerate_config": Gone(LAUNCHER.why, (), LAUNCH),
    "config": Gone("the recipe is the configuration", (), "--recipe FILE"),
    "do_eval": Gone("eval_strategy alone decides whether a run evaluates"),
    "do_predict": Gone("scripts/sft.py trains; it predicts nothing", (False, None), "scripts/generate.py"),
    "do_train": Gone("scripts/sft.py trains", (True,)),
    "env": Gone("variables are the shell's, set before Python starts", ({}, None), "export NAME=value"),
    "local_rank": Gone("the launcher tells each rank its number"),
    "machine_rank": LAUNCHER,
    "num_machines": LAUNCHER,
    "num_processes": LAUNCHER,
    "overwrite_output_dir": Gone("a run that is there is kept unless --overwrite is given on the command line"),
    # ---- alignment-handbook ----
    "auto_insert_empty_system_msg": Gone("rows are rendered as they are", (False, None), "put it into the rows"),
    "base_model_revision": Gone("an adapter names its base itself", (None,)),
    "max_eval_samples": Gone("TRL's recipes have no such key", (None,), "datasets: - path: … with rows: N"),
    "max_train_samples": Gone("TRL's recipes have no such key", (None,), "datasets: - path: … with rows: N"),
    "model_code_revision": Gone("model_revision pins code and weights", (None, "main"), "model_revision: …"),
    "truncation_side": Gone("long rows are cut at their end", ("right", None)),
    # ---- open-r1 ----
    "benchmarks": Gone(OPEN_R1, ([], None), "evaluate the result: scripts/compare.py"),
    "callbacks": Gone(OPEN_R1, ([], None)),
    "overwrite_hub_revision": Gone(OPEN_R1, (False, None), "push_to_hub: true with hub_revision: NAME"),
    "push_to_hub_revision": Gone(OPEN_R1, (False, None), "push_to_hub: true with hub_revision: NAME"),
    "system_prompt": Gone("open-r1 reads it in its benchmarks only, not in training"),
    "wandb_project": Gone("the trackers' project is one key", (None,), "project: NAME"),
    # ---- Transformers and TRL ----
    "adafactor": Gone("optimizers are named by optim", (False,), "optim: adafactor"),
    "chars_per_token": ESTIMATE,
    "dataset_batch_size": ESTIMATE,
    "dispatch_batches": Gone("it moved into a block", (None,), "accelerator_config: {dispatch_batches: …}"),
    "fp16_backend": TORCH_AMP,
    "fp16_opt_level": TORCH_AMP,
    "fsdp_min_num_params": Gone("FSDP is set up in accelerate_configs/fsdp.yaml", (0,)),
    "fsdp_transformer_layer_cls_to_wrap": Gone("FSDP is set up in accelerate_configs/fsdp.yaml", (None,)),
    "half_precision_backend": TORCH_AMP,
    "include_inputs_for_metrics": Gone("an evaluation computes the loss alone", (False,)),
    "include_tokens_per_second": Gone("metrics.jsonl always has tokens_per_second"),
    "jit_mode_eval": Gone("TorchScript is gone from Transformers", (False,), "torch_compile: true"),
    "logging_dir": Gone("TensorBoard's folder is taken from the environment: TENSORBOARD_LOGGING_DIR"),
    "mp_parameters": Gone("it belongs to SageMaker's model parallelism", ("", None)),
    "num_of_sequences": ESTIMATE,
    "past_index": Gone("no model of today has it", (-1,)),
    "push_to_hub_organization": Gone("it is a part of the model's id", (None,), "hub_model_id: ORGANIZATION/NAME"),
    "ray_scope": Gone("it belongs to Ray's hyperparameter search"),
    "save_safetensors": Gone("weights are written as safetensors only", (True,)),
    "split_batches": Gone("it moved into a block", (None, False), "accelerator_config: {split_batches: …}"),
    "torchdynamo": Gone("it is called torch_compile_backend", (None,), "torch_compile: true"),
    "tpu_num_cores": Gone("a TPU's cores are all used", (None,)),
    "use_ipex": Gone("PyTorch holds Intel's kernels itself", (False,)),
    "use_legacy_prediction_loop": Gone("there is one evaluation loop", (False,)),
    "use_mps_device": Gone("Apple's GPU is found by itself"),
}

HANDLERS: dict[str, Callable[[_Translation, str], None]] = {}


def translate(pairs: Pairs, source: Source, errors: list[RecipeError]) -> Pairs:
    """The keys of one file (or one flag) in today's words; what is not old comes back as it is."""
    return _Translation(pairs, source, errors).run()


def _handles(*names: str) -> Callable[[Callable[[_Translation, str], None]], Callable[[_Translation, str], None]]:
    def register(handler: Callable[[_Translation, str], None]) -> Callable[[_Translation, str], None]:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class _Translation:
    def __init__(self, pairs: Pairs, source: Source, errors: list[RecipeError]):
        self.pairs, self.source, self.errors = pairs, source, errors
        self.result: Pairs = {}

    def run(self) -> Pairs:
        for name, (key, value) in self.pairs.items():
            if name in HANDLERS:
                HANDLERS[name](self, name)
            elif name in GONE:
                self.leave_out(name, GONE[name])
            elif name in RENAMED:
                self.put(RENAMED[name], value, old=name)
                self.note(name, f"{name} is called {RENAMED[name]} today")
            else:
                self.result[name] = (key, value)
        for (name, old), new in RENAMED_VALUES.items():
            if name in self.result and self.plain(self.result[name][1]) == old:
                key, value = self.result[name]
                self.result[name] = (key, _node(new, value))
                self.note_at(self.source.where(value), f"{name}: {old} is called {new} today")
        return self.result

    def put(self, new: str, value: yaml.Node, old: str) -> None:
        """Set today's key, at the place of the old one."""
        if new in self.pairs or new in self.result:
            self.error(old, f"{old} and {new} are both set", why=f"{old} is an old name for it", help=f"keep {new}")
        else:
            self.result[new] = (self.pairs[old][0], value)

    def leave_out(self, name: str, gone: Gone) -> None:
        value = self.plain(self.pairs[name][1])
        if gone.harmless is None or any(value == good and type(value) is type(good) for good in gone.harmless):
            self.note(name, f"{name} is left out: {gone.why}")
        else:
            self.error(name, f"{name}: {value} is not possible any more", why=gone.why, help=gone.help)

    def plain(self, node: yaml.Node | None) -> Any:
        """The value of a node as Python has it; None where it has none."""
        try:
            return None if node is None else constructed(node)
        except ValueError:
            return None

    def value(self, name: str) -> Any:
        return self.plain(self.pairs[name][1]) if name in self.pairs else None

    def note(self, name: str, text: str) -> None:
        self.note_at(self.source.where(self.pairs[name][0]), text)

    def note_at(self, where: str, text: str) -> None:
        self.source.notes.append(f"{where}: {text}")

    def error(self, name: str, what: str, why: str = "", help: str = "") -> None:
        where = self.source.where(self.pairs[name][0])
        self.errors.append(RecipeError(what, where=where, why=why, help=help))


@_handles("warmup_ratio")
def _warmup_ratio(t: _Translation, name: str) -> None:
    ratio = t.value(name)
    if isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and ratio >= 1:
        t.error(name, f"{name} is {ratio}; it must be below 1", help="warmup_steps takes a share or a count")
        return
    t.put("warmup_steps", t.pairs[name][1], old=name)
    t.note(name, "warmup_ratio is called warmup_steps today, which takes a share below 1 as well as a count")


SWITCHES = {
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
}


@_handles(*SWITCHES)
def _switch(t: _Translation, name: str) -> None:
    new, value = SWITCHES[name]
    if t.value(name) is True:
        t.put(new, _node(value, t.pairs[name][1]), old=name)
        t.note(name, f"{name}: true is written {new}: {value} today")
    elif t.value(name) is False:
        t.note(name, f"{name} is left out: {new} says it today")
    else:
        t.error(name, f"{name} takes true or false", why=f"it is an old name for {new}: {value}")


@_handles("gradient_checkpointing_use_reentrant")
def _reentrant(t: _Translation, name: str) -> None:
    t.put("gradient_checkpointing_kwargs", _node({"use_reentrant": t.value(name)}, t.pairs[name][1]), old=name)
    t.note(name, f"{name} is called use_reentrant today, in the block gradient_checkpointing_kwargs")


@_handles("tokenizer_name_or_path")
def _tokenizer(t: _Translation, name: str) -> None:
    model = t.value("model_name_or_path")
    if t.value(name) in (None, model):
        t.note(name, f"{name} is left out: the tokenizer is taken from the model")
    else:
        why = "the tokenizer is taken from the model, so that the two cannot differ"
        t.error(
            name, f"{name} names another tokenizer than the model's", why, "remove it; chat_template sets a template"
        )


@_handles("dataset_kwargs")
def _dataset_kwargs(t: _Translation, name: str) -> None:
    """TRL once added special tokens, and a token between packed rows; both are off here, as in the handbook."""
    key, value = t.pairs[name]
    off = {"add_special_tokens", "append_concat_token"}
    pairs = value.value if isinstance(value, yaml.MappingNode) else []
    kept = [(k, v) for k, v in pairs if str(k.value) not in off or t.plain(v) is not False]
    if len(kept) == len(pairs):
        t.result[name] = (key, value)
        return
    t.note(name, f"{', '.join(sorted(off))} are left out of {name}: nothing is added to what the template renders")
    if kept:
        t.result[name] = (key, _mapping(kept, value))


@_handles("dataset_mixture")
def _mixture(t: _Translation, name: str) -> None:
    """alignment-handbook and open-r1: a block of `datasets`, `seed` and `test_split_size`."""
    known = mapping(t.pairs[name][1], t.source.file, t.errors)
    for inner, (key, value) in known.items():
        where = t.source.where(key)
        if inner == "datasets" and isinstance(value, yaml.SequenceNode):
            entries = [_entry(t, item) for item in value.value]
            t.put("datasets", _sequence(entries, value), old=name)
        elif inner in ("datasets", "test_split_size"):
            t.put(inner, value, old=name)
        elif inner == "seed":
            t.note_at(where, f"{name}: seed is left out: the recipe's own seed decides which rows are drawn")
        else:
            t.errors.append(unknown_key(inner, ["datasets", "seed", "test_split_size"], where, block=name))
    t.note(
        name, f"{name} is called datasets today; id is path, config is name, and weight (of a set's own rows) is rows"
    )


def _entry(t: _Translation, node: yaml.Node) -> yaml.Node:
    if not isinstance(node, yaml.MappingNode):
        return node
    words = {"id": "path", "config": "name", "weight": "rows"}
    kept = []
    for key, value in node.value:
        if key.value == "weight" and (share := t.plain(value)) in (1, None) and share is not True:
            continue  # the whole set
        renamed = yaml.ScalarNode(key.tag, words.get(key.value, key.value), key.start_mark, key.end_mark)
        kept.append((renamed if isinstance(key, yaml.ScalarNode) else key, value))
    return _mapping(kept, node)


@_handles("dataset_mixer")
def _mixer(t: _Translation, name: str) -> None:
    """The older handbook: `{id: share}`, with `dataset_splits` and `dataset_configs` beside it."""
    sets, at = t.value(name), t.pairs[name][1]
    splits, configs = t.value("dataset_splits") or ["train", "test"], t.value("dataset_configs")
    if isinstance(sets, dict) and not configs:
        configs = [None] * len(sets)
    if not (
        isinstance(sets, dict) and isinstance(splits, list) and isinstance(configs, list) and len(configs) == len(sets)
    ):
        t.error(name, f"{name} takes {{id: share}}, and as many dataset_configs", help="datasets:\n  - path: …")
        return
    train = [split for split in splits if "test" not in str(split)]
    entries = [
        {"path": path, "name": config, "split": split, "rows": None if share == 1 else share}
        for (path, share), config in zip(sets.items(), configs, strict=True)
        for split in train
    ]
    t.put("datasets", _node([{k: v for k, v in e.items() if v is not None} for e in entries], at), old=name)
    t.note(name, f"{name} is called datasets today, and the share of a set that is taken is its rows")
    evaluates = t.value("eval_strategy") or t.value("evaluation_strategy")
    if evaluates in ("steps", "epoch") and len(train) < len(splits) and sets:
        t.put("eval_dataset_name", _node(next(iter(sets)), at), old=name)
        t.put("dataset_test_split", _node(next(s for s in splits if s not in train), at), old=name)
        if len(sets) > 1:
            t.note(name, f"evaluated is the test split of the first data set alone, {next(iter(sets))}")


@_handles("dataset_splits", "dataset_configs")
def _beside_mixer(t: _Translation, name: str) -> None:
    value = t.value(name)
    if "dataset_mixer" in t.pairs:
        return  # read with it
    if name == "dataset_configs" and isinstance(value, list) and len(value) == 1 and "dataset_name" in t.pairs:
        t.put("dataset_config", _node(value[0], t.pairs[name][1]), old=name)
        t.note(name, "dataset_configs is called dataset_config today")
        return
    help = "dataset_config: …" if name == "dataset_configs" else "dataset_train_split and dataset_test_split"
    t.error(name, f"{name} is not possible any more", why="it belongs to dataset_mixer", help=help)


def _node(value: Any, at: yaml.Node) -> yaml.Node:
    """A value as a YAML node that stands where `at` does."""
    if isinstance(value, dict):
        return _mapping([(_node(k, at), _node(v, at)) for k, v in value.items()], at)
    if isinstance(value, list):
        return _sequence([_node(item, at) for item in value], at)
    node = yaml.representer.SafeRepresenter().represent_data(value)
    return yaml.ScalarNode(node.tag, node.value, at.start_mark, at.end_mark, style="'")


def _mapping(pairs: list[tuple[yaml.Node, yaml.Node]], at: yaml.Node) -> yaml.MappingNode:
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, at.start_mark, at.end_mark)


def _sequence(items: list[yaml.Node], at: yaml.Node) -> yaml.SequenceNode:
    return yaml.SequenceNode("tag:yaml.org,2002:seq", items, at.start_mark, at.end_mark)
