"""What becomes of the Axolotl keys that need arithmetic, another file, or a look at other keys.

Axolotl's `type` of a data set says both the columns and the text around them. Here columns are recognized, with
`column_map` for other names, and the text is the chat template's or `prompt_template`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from stepladder import files
from stepladder.data.conversation import REASONING, ROLES
from stepladder.data.source import is_local
from stepladder.errors import RecipeError
from stepladder.recipe.axolotl_config import (
    CONDITIONS,
    TRANSLATED,
    Config,
    Outcome,
    drop,
    refuse,
    rule,
    set_keys,
    table,
)
from stepladder.suggest import suggest

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
ATTENTION_AND_MLP = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
CHAT, PLAIN = None, ""  # rendered by the chat template; trained as it is


# ---- conditions on several keys ----


def _evaluates(config: Config) -> bool:
    return config.number("val_set_size", 0) > 0 or config.has("test_datasets")


def _keeps_best(config: Config) -> bool:
    """Whether Axolotl would end with the best checkpoint: it saves and evaluates by steps, in step with each other."""

    def interval(what: str) -> float:
        times = config.number(f"{what}s_per_epoch", 0) * config.number("num_epochs", 1)
        return 1 / times if times > 1 else config.number(f"{what}_steps", 0)

    save, evaluate = interval("save"), interval("eval")
    return bool(_evaluates(config) and save > 0 and evaluate > 0 and save % evaluate == 0)


def _shuffles_rows(config: Config) -> bool:
    """Axolotl shuffles data sets that it merges, even if their rows are to keep their order."""
    merges = config.values.get("shuffle_merged_datasets") is not False and len(config.entries("datasets")) > 1
    return merges or bool(config.get("shuffle_before_merging_datasets"))


def _fsdp_setting(config: Config, name: str) -> Any:
    block = config.block("fsdp_config")
    return block.get(name) or block.get(f"fsdp_{name}")


def _held_dtype(config: Config) -> str | None:
    """The precision that Axolotl holds the weights in: that of the computation, not fp32. None: another key decides."""
    if config.get("adapter") == "qlora" or config.get("load_in_4bit") or config.get("load_in_8bit"):
        return None  # quantization decides
    if config.get("fp16") and config.get("bf16", "auto") is False:
        return "float16" if config.has("adapter") else None  # fp16 weights cannot be trained themselves
    return "auto" if config.get("fp16") and config.get("bf16", "auto") == "auto" else "bfloat16"


def _covers_linear_layers(config: Config) -> bool:
    """Whether `lora_target_modules` names the linear layers of a Llama-like block, as `lora_target_linear` does."""
    modules = config.get("lora_target_modules")
    names = {*map(str, modules)} if isinstance(modules, list) else {str(modules)}
    return names >= ATTENTION_AND_MLP >= names - {"gate_proj"}


def _only_file(entry: Config) -> str | None:
    """The name of the only file that `data_files` lists, if it is one."""
    files = entry.get("data_files")
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    return files if isinstance(files, str) else None


def _is_local(entry: Config) -> bool:
    path = str(entry.get("path", ""))
    return is_local(path) or Path(path).suffix in KINDS


def _has_other_suffix(entry: Config) -> bool:
    """Whether `ds_type` says how a local file is read, since its name does not."""
    path, kind = str(entry.get("path", "")), entry.get("ds_type")
    return bool(kind) and _is_local(entry) and not os.path.isdir(path) and KINDS.get(Path(path).suffix) != kind


CONDITIONS |= {
    "evaluates": _evaluates,
    "keeps_best": _keeps_best,
    "shuffles_rows": _shuffles_rows,
    "min_lr_falls": lambda config: config.number("cosine_min_lr_ratio", 0) < 1,
    "has_completion": lambda config: any(entry.get("type") == "completion" for entry in config.entries("datasets")),
    "checkpoints_under_fsdp": lambda config: _fsdp_setting(config, "activation_checkpointing"),
    "offloads_under_fsdp": lambda config: (
        _fsdp_setting(config.root, "offload_params") or "offload" in str(config.root.get("fsdp"))
    ),
    "held_dtype": _held_dtype,
    "quant_type": lambda config: None if "bnb_4bit_quant_type" in config.block("bnb_config_kwargs") else "nf4",
    "nested_quant": lambda config: None if "bnb_4bit_use_double_quant" in config.block("bnb_config_kwargs") else True,
    "covers_linear_layers": _covers_linear_layers,
    "shard_share": lambda entry: round(1 / entry.number("shards", 1), 6),
    "only_file": _only_file,
    "is_local": _is_local,
    "has_other_suffix": _has_other_suffix,
}


# ---- rules ----


@rule
def optimizer_arguments(value: Any, config: Config) -> Outcome:
    return set_keys(optim_args=",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value)


@rule
def batch_size(value: Any, config: Config) -> Outcome:
    micro = config.number("micro_batch_size", 1)
    steps, rest = divmod(config.number("batch_size", 1), micro) if micro > 0 else (0, 1)
    if rest or steps < 1:
        return refuse("not a multiple of micro_batch_size")
    return set_keys("batch_size ÷ micro_batch_size", gradient_accumulation_steps=int(steps))


@rule
def evals_per_epoch(value: Any, config: Config) -> Outcome:
    return _per_epoch("eval", config) or set_keys(eval_strategy="no")


@rule
def saves_per_epoch(value: Any, config: Config) -> Outcome:
    return _per_epoch("save", config) or drop("off")


def _per_epoch(what: str, config: Config) -> Outcome | None:
    """So many times per epoch is a share of all steps."""
    times, epochs = config.number(f"{what}s_per_epoch", 1), config.number("num_epochs", 1)
    if times <= 0:
        return None
    if times == 1 or times * epochs <= 1:
        return set_keys(**{f"{what}_strategy": "epoch"})
    why = f"{times:g} times in each of {epochs:g} epochs, as a share of all steps"
    return set_keys(why, **{f"{what}_strategy": "steps", f"{what}_steps": round(1 / (times * epochs), 6)})


@rule
def deepspeed(value: Any, config: Config) -> Outcome:
    """ZeRO's stage and offloading from the file, where it is at hand, else from its name.

    Raises:
        RecipeError: the file is there and cannot be read.
    """
    settings = value if isinstance(value, dict) else _read_json(str(value), config)
    if others := [key for key in ("optimizer", "scheduler", "tensor_parallel", "autotp_size") if settings.get(key)]:
        return refuse(f"its {others[0]} would decide in place of the configuration: the strategy's file has none")
    zero = settings.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    name = "" if isinstance(value, dict) else str(value).lower()
    in_name = re.search(r"zero[-_]?([123])", name)
    stage = zero.get("stage", int(in_name[1]) if in_name else None)
    offloads = bool(zero.get("offload_param") or zero.get("offload_optimizer")) if zero else "offload" in name
    if stage == 3:
        return Outcome(TRANSLATED, strategy="zero3_offload" if offloads else "zero3")
    if stage in (1, 2):
        why = "gradients are sharded too" if stage == 1 else "the optimizer's state stays on the GPUs" * offloads
        return Outcome(TRANSLATED, why, strategy="zero2")
    why = "its ZeRO stage cannot be told: with zero2.yaml or zero3.yaml the curve is the same"
    return refuse(why, changes_training=False)


def _read_json(name: str, config: Config) -> dict[str, Any]:
    file = None
    try:
        file = next((f for f in (config.file.parent / name, Path(name)) if f.is_file()), None)
        content = files.read_json(file) if file else {}
    except (ValueError, OSError) as error:
        what = f"deepspeed: {file or name} cannot be read: {error}"
        raise RecipeError(what, where=config.where("deepspeed")) from None
    return content if isinstance(content, dict) else {}


@rule
def properties(value: Any, entry: Config) -> Outcome:
    """The names inside a message; those of the chat templates and of ShareGPT are both read."""
    names = value if isinstance(value, dict) else {}
    known = {"role": ("role", "from"), "content": ("content", "value"), **dict.fromkeys(REASONING, REASONING)}
    others = [name for name, source in names.items() if source not in known.get(name, (name,))]
    return refuse(f"the {others[0]} is not read from '{names[others[0]]}'") if others else drop("recognized")


@rule
def roles(value: Any, entry: Config) -> Outcome:
    """Which names in the rows stand for a role: `{assistant: [bot]}` becomes `role_map: {bot: assistant}`."""
    role_map: dict[str, str] = {}
    for role, names in value.items() if isinstance(value, dict) else [("", [])]:
        if role not in ROLES.values() or not isinstance(names, list):
            return refuse(f"a list of names for each role; roles are {', '.join(dict.fromkeys(ROLES.values()))}")
        for name in map(str, names):
            if ROLES.get(name, role) != role or role_map.get(name, role) != role:
                return refuse(f"{name} is another role: rename it in the rows")
            role_map |= {} if name in ROLES else {name: role}
    return Outcome(TRANSLATED, block={"role_map": role_map}) if role_map else drop("recognized")


def _rendering(kind: Any) -> str | None:
    """The text before the answer that a `type` means; PLAIN for none, CHAT for the chat template and unknown types."""
    if not isinstance(kind, dict):
        return table()["prompts"].get(str(kind))
    text = str(kind.get("no_input_format") or kind.get("format") or "{instruction} ")
    system = str(kind.get("system_prompt") or "")
    before = str(kind.get("system_format") or "{system}").replace("{system}", system) if system else ""
    return before + text.replace("{instruction}", "{input}")


@rule
def data_type(value: Any, entry: Config) -> Outcome:
    if not isinstance(value, dict) and str(value) not in table()["prompts"]:
        hint = suggest(str(value), table()["prompts"]) or "its text can be given as prompt_template"
        return refuse(f"not known here: without it the chat template renders what the columns show; {hint}")
    return _prompt(value, entry)


@rule
def custom_text(value: Any, kind: Config) -> Outcome:
    """A part of a custom type's text; the recipe's prompt_template is the whole of it."""
    return _prompt(kind.values, kind)


def _prompt(kind: Any, config: Config) -> Outcome:
    prompt = _rendering(kind)
    if prompt == PLAIN:
        return drop("a column 'text' is trained as it is")  # longer ones: see the default of excess_length_strategy
    if not {_rendering(entry.get("type")) for entry in config.root.entries("datasets")} - {PLAIN} <= {prompt}:
        return refuse("a recipe has one rendering for all its data sets: make them of one type")
    if prompt is CHAT:
        return drop("recognized by its columns, rendered by the chat template")
    return set_keys("a row's `input` follows its instruction after an empty line", prompt_template=prompt)


@rule
def chat_template(value: Any, config: Config) -> Outcome:
    """Which template renders the chats; one of a data set's own comes before that of the whole configuration.

    A text or a file (`chat_template_jinja`) is read where `chat_template` is `jinja`, or is not set.
    """
    name, root = str(config.get("chat_template", "jinja")), config.root
    entries = root.entries("datasets")
    chats = [entry for entry in entries if _rendering(entry.get("type")) is CHAT]
    if entries and not chats:
        return drop("no data set is rendered by it")
    used = {_template_name(entry) or _template_name(root.values) or "tokenizer_default" for entry in chats}
    if len(used) > 1:
        return refuse("a recipe has one template for all its data sets")
    if used and name not in used:
        return drop("the data sets have one of their own")
    if name == "tokenizer_default":
        return drop("the model's own, as here")
    if name == "jinja":
        return _jinja(config.get("chat_template_jinja") or config.root.get("chat_template_jinja"), config)
    if name in table()["templates"]:
        ends = "; it ends a conversation with EOS too" if name.startswith("phi_") else ""
        why = f"TRL's of that family, in place of the model's own{ends}"
        return set_keys(why, chat_template=table()["templates"][name])
    if name.startswith("tokenizer_default_fallback_"):
        return refuse("whether the model has one of its own decides: tokenizer_default if it has, else the name")
    return refuse("not known here: without it the model's own is used, which tokenizer_default asks for")


def _template_name(values: dict[str, Any]) -> str:
    """The name that a data set or the whole configuration sets, or nothing."""
    return str(values.get("chat_template") or ("jinja" if values.get("chat_template_jinja") else ""))


def _jinja(value: Any, config: Config) -> Outcome:
    text = str(value or "")
    if "{%" in text or "{{" in text:
        return set_keys(chat_template=text)
    for file in (config.file.parent / text, Path(text)) if text else ():
        if file.is_file():
            return set_keys(chat_template_path=str(file))
    return refuse("chat_template_jinja is a template's text, or a file that is there")
