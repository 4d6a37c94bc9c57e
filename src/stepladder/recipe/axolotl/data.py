"""The data sets of an Axolotl configuration: where their rows lie, which columns are read, how they are rendered.

Axolotl's `type` says both the columns and the text around them. Here columns are recognized,
with `column_map` for other names, and the text is the chat template's or `prompt_template`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from stepladder.data.conversation import MASKS, REASONING, ROLES
from stepladder.errors import suggest
from stepladder.recipe.axolotl.config import Config
from stepladder.recipe.axolotl.outcome import (
    Outcome,
    Rule,
    drop,
    dropped,
    each,
    in_block,
    left_out,
    only,
    only_with,
    refused,
    sets,
    unsupported,
    usual,
)

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
BUILDERS = set(KINDS.values())
REMOTE = ("s3://", "gs://", "gcs://", "adl://", "abfs://", "az://", "oci://", "http://", "https://")

# What Axolotl writes before the answer; `{input}` is the question.
BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CHAT, PLAIN = None, ""  # rendered by the chat template; trained as it is
TYPES: dict[str, str | None] = {
    "chat_template": CHAT,
    "sharegpt": CHAT,
    "completion": PLAIN,
    "alpaca": f"{BELOW}\n\n### Instruction:\n{{input}}\n\n### Response:\n",
    "alpaca:chat": f"SYSTEM: {BELOW}\nUSER: {{input}}\nASSISTANT:",
    "alpaca:chatml": f"<|im_start|>system\n{BELOW}<|im_end|>\n<|im_start|>user\n{{input}}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "alpaca:phi": f"<|system|>\n{BELOW}<|end|>\n<|user|>\n{{input}}<|end|>\n<|assistant|>\n",
    "alpaca_chat.load_qa": "SYSTEM: Below is an instruction from a USER that describes a task. The ASSISTANT writes a "
    "response that appropriately and concisely completes the request.\n\n\nUSER: {input}\nASSISTANT:",
}
TYPES |= {"alpaca:instruct": TYPES["alpaca"], "alpaca_instruct.load": TYPES["alpaca"]}
TYPES |= {"alpaca_chat.load": TYPES["alpaca:chat"]}

# Axolotl's names of chat templates, and those of TRL's that render the same text; phi's end with EOS here too.
TEMPLATES = {name: name for name in ("chatml", "llama3", "gemma", "gemma3", "gemma4", "qwen3", "cohere")}
TEMPLATES |= {"phi_3": "phi3", "phi_35": "phi3_5", "qwen_25": "qwen2_5", "deepseek_v3": "deepseekv3"}
TEMPLATES |= {"aya": "cohere", "gemma3n": "gemma3", "gemma4_unified": "gemma4", "qwen3_5": "qwen3"}
TEMPLATES |= {"llama3_2_vision": "llama3_2", "qwen2_vl": "qwen2_5_vl"}


def is_local(path: str) -> bool:
    """A file or folder that is there, or a name that can only be meant as one; anything else is a hub id."""
    return os.path.exists(path) or path.startswith((".", "/", "~")) or Path(path).suffix in KINDS


# ---- where the rows lie ----


def path(value: Any, entry: Config) -> Outcome:
    name, kind = str(value), entry.get("ds_type")
    if name.startswith(REMOTE):
        return unsupported("local files and hub data sets are: download it first")
    if name in BUILDERS and _one_file(entry.get("data_files")):
        return dropped("data_files names the file")
    if kind and is_local(name) and not os.path.isdir(name) and KINDS.get(Path(name).suffix) != kind:
        return in_block("its suffix does not say what it is", path=kind, data_files=name)
    return in_block(path=name)


def data_files(value: Any, entry: Config) -> Outcome:
    file = _one_file(value)
    return in_block(path=file) if file and entry.get("path") in BUILDERS else in_block(data_files=value)


def _one_file(files: Any) -> str:
    """The name of the only file that is listed, if it is one."""
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    return files if isinstance(files, str) else ""


def split(value: Any, entry: Config) -> Outcome:
    return dropped("as here") if value == "train" else in_block(split=value)


def subset(value: Any, entry: Config) -> Outcome:
    if isinstance(value, list):
        return unsupported("one configuration in each block: repeat the block")
    return dropped("local files have none") if is_local(str(entry.get("path", ""))) else in_block(name=value)


def shards(value: Any, entry: Config) -> Outcome:
    """Axolotl shuffles the rows and takes one shard of them."""
    count = entry.number("shards", 1)
    if count < 1 or count % 1:
        return unsupported("a whole number from 1 up")
    if count == 1:
        return dropped("one shard is the whole")
    return in_block("as many rows as one shard holds, though not the same ones", rows=round(1 / count, 6))


# ---- which columns are read ----


def column(name: str) -> Rule:
    """The column that is read as `name`."""
    return lambda value, entry: dropped("as here") if value == name else in_block(column_map={name: value})


def messages(value: Any, entry: Config) -> Outcome:
    return dropped("recognized") if value == "conversations" else column("messages")(value, entry)


def properties(value: Any, entry: Config) -> Outcome:
    """The names inside a message; those of the chat templates and of ShareGPT are both read."""
    names = value if isinstance(value, dict) else {}
    known = {"role": ("role", "from"), "content": ("content", "value"), **dict.fromkeys(REASONING, REASONING)}
    others = [name for name, source in names.items() if source not in known.get(name, (name,))]
    return unsupported(f"the {others[0]} is not read from '{names[others[0]]}'") if others else dropped("recognized")


def roles(value: Any, entry: Config) -> Outcome:
    """Which names in the rows stand for a role: `{assistant: [bot]}` becomes `role_map: {bot: assistant}`."""
    role_map: dict[str, str] = {}
    for role, names in value.items() if isinstance(value, dict) else [("", [])]:
        if role not in ROLES.values() or not isinstance(names, list):
            return unsupported(f"a list of names for each role; roles are {', '.join(dict.fromkeys(ROLES.values()))}")
        for name in map(str, names):
            if ROLES.get(name, role) != role or role_map.get(name, role) != role:
                return unsupported(f"{name} is another role: rename it in the rows")
            role_map |= {} if name in ROLES else {name: role}
    return in_block(role_map=role_map) if role_map else dropped("recognized")


# ---- how they are rendered ----

ONE = "a recipe has one rendering for all its data sets: make them of one type"
BESIDE = "a row's `input` follows its instruction after an empty line"


def rendering(kind: Any) -> str | None:
    """The text before the answer that a `type` means; CHAT for the chat template, PLAIN for none.

    Raises:
        KeyError: none that is known here.
    """
    if not isinstance(kind, dict):
        return CHAT if kind in (None, "") else TYPES[str(kind)]
    text = str(kind.get("no_input_format") or kind.get("format") or "{instruction} ")
    system = str(kind.get("system_prompt") or "")
    before = str(kind.get("system_format") or "{system}").replace("{system}", system) if system else ""
    return before + text.replace("{instruction}", "{input}")


def data_type(value: Any, entry: Config) -> Outcome:
    if value == "input_output":
        return unsupported("rows of `segments` are not read: give them as prompt and completion")
    try:
        prompt = rendering(value)
    except KeyError:
        hint = suggest(str(value), TYPES) or "its text can be given as prompt_template"
        return unsupported(f"not known here: without it the chat template renders what the columns show; {hint}")
    if prompt == PLAIN:
        return dropped("a column 'text' is trained as it is")  # longer ones: see `importer._not_set`
    if not _of_one_kind(prompt, entry.root):
        return unsupported(ONE)
    if prompt is CHAT:
        return dropped("recognized by its columns, rendered by the chat template")
    return sets(BESIDE, prompt_template=prompt)


def custom_format(value: Any, kind: Config) -> Outcome:
    if "{input}" in str(value) and not kind.has("no_input_format"):
        return unsupported("prompt_template has one place, for the question: give a no_input_format")
    return custom_text(value, kind)


def custom_text(value: Any, kind: Config) -> Outcome:
    """A part of a custom type's text; the recipe's prompt_template is the whole of it."""
    prompt = rendering(kind.values)
    return sets(BESIDE, prompt_template=prompt) if _of_one_kind(prompt, kind.root) else unsupported(ONE)


def _of_one_kind(prompt: str | None, config: Config) -> bool:
    return {_rendering_or_chat(entry.get("type")) for entry in config.entries("datasets")} - {PLAIN} <= {prompt}


def _rendering_or_chat(kind: Any) -> str | None:
    """As `rendering`; the rows of a type that is not known are rendered by the chat template."""
    try:
        return rendering(kind)
    except KeyError:
        return CHAT


def chat_template(value: Any, config: Config) -> Outcome:
    name, root = str(value), config.root
    entries = root.entries("datasets")
    chats = [entry for entry in entries if _rendering_or_chat(entry.get("type")) is CHAT]
    if entries and not chats:
        return dropped("no data set is rendered by it")
    used = {_template_name(entry) or _template_name(root.values) or "tokenizer_default" for entry in chats}
    if len(used) > 1:
        return unsupported("a recipe has one template for all its data sets")
    if used and name not in used:
        return dropped("the data sets have one of their own")
    if name == "tokenizer_default":
        return dropped("the model's own, as here")
    if name == "jinja":
        return _jinja(config.get("chat_template_jinja") or config.root.get("chat_template_jinja"), config)
    if name in TEMPLATES:
        ends = "; it ends a conversation with EOS too" if name.startswith("phi_") else ""
        return sets(f"TRL's of that family, in place of the model's own{ends}", chat_template=TEMPLATES[name])
    if name.startswith("tokenizer_default_fallback_"):
        return unsupported("whether the model has one of its own decides: tokenizer_default if it has, else the name")
    return unsupported("not known here: without it the model's own is used, which tokenizer_default asks for")


def chat_template_jinja(value: Any, config: Config) -> Outcome:
    """A template as text or as a file; Axolotl reads it where chat_template is not set, or is `jinja`."""
    if config.has("chat_template"):
        used = _template_name(config.values) == "jinja"
        return dropped("read with chat_template" if used else "of chat_template: jinja only")
    return chat_template("jinja", config)


def _template_name(values: dict[str, Any]) -> str:
    """The name that a data set or the whole configuration sets, or nothing."""
    return str(values.get("chat_template") or ("jinja" if values.get("chat_template_jinja") else ""))


def _jinja(value: Any, config: Config) -> Outcome:
    text = str(value or "")
    if "{%" in text or "{{" in text:
        return sets(chat_template=text)
    for file in (config.file.parent / text, Path(text)) if text else ():
        if file.is_file():
            return sets(chat_template_path=str(file))
    return unsupported("chat_template_jinja is a template's text, or a file that is there")


SFT_ONLY = "another kind of training: this is supervised fine-tuning"
TRAINED = "the assistant's words and its end of turn are trained; train_on changes that"
KEYS: dict[str, Rule] = {
    "path": path,
    "data_files": data_files,
    "ds_type": drop("the path says it"),
    "split": split,
    "name": subset,
    "shards": shards,
    "shards_idx": drop("which of the shards: see there"),
    "preprocess_shards": drop("how the preparation is cut up"),
    "revision": refused("the newest revision of a hub data set is taken"),
    "trust_remote_code": usual(why="code of a data set is not run"),
    "type": data_type,
    **{f"type.field_{name}": column(name) for name in ("instruction", "input", "output")},
    "type.field_system": usual("system", why="a system text of each row's own: give the rows as messages"),
    "type.system_prompt": custom_text,
    "type.system_format": only_with(lambda kind: kind.has("system_prompt"), "no system_prompt", custom_text),
    "type.format": custom_format,
    "type.no_input_format": custom_text,
    "field": only_with(lambda entry: entry.get("type") == "completion", "of type completion only", column("text")),
    "text_column": column("text"),
    "field_messages": messages,
    "field_tools": column("tools"),
    "message_property_mappings": properties,
    "message_field_role": usual("role", "from", why="the role is not read from there"),
    "message_field_content": usual("content", "value", why="the text is not read from there"),
    "field_thinking": usual(*REASONING, why=f"read from {', '.join(REASONING)} only: rename it in the rows"),
    "template_thinking_key": usual(*REASONING, why="the name that the template renders decides"),
    "split_thinking": usual(why="reasoning stays where the rows have it"),
    "roles": roles,
    "roles_to_train": only(["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"], why=TRAINED),
    **each("train_on_eos train_on_eot", usual("turn", why=TRAINED)),
    "message_field_training": only(*MASKS, why=f"a message's own flag is read from {', '.join(MASKS)} only"),
    "message_field_training_detail": refused("a message is trained whole, or not at all"),
    "drop_system_message": usual(why="system messages stay"),
    "chat_template": chat_template,
    "chat_template_jinja": chat_template_jinja,
    "conversation": refused("FastChat's templates are gone from Axolotl too: name a chat_template"),
    **each("input_transform input_format", refused("code of your own: transform the file")),
    **each("field_human field_model", refused("give the rows as messages")),
    **each("logprobs_field temperature field_chosen field_rejected step_separator", refused(SFT_ONLY)),
    **each("max_completion_length train_on_last_step_only", refused(SFT_ONLY)),
    **each("skip length sequence_length min_input_id max_input_id seed", refused("rows are read, as they are")),
}


def for_evaluation(key: str, value: Any, entry: Config, outcome: Outcome) -> Outcome:
    """The same key in `test_datasets`: one file or hub data set, read as the first of `datasets` is."""
    names = {"path": "eval_dataset_name", "split": "dataset_test_split"}
    if outcome.block.keys() <= names.keys():
        recipe = {**outcome.recipe, **{names[name]: found for name, found in outcome.block.items()}}
        return dataclasses.replace(outcome, block={}, recipe=recipe)
    if any(trained.get(key) == value for trained in entry.root.entries("datasets")[:1]):
        return dropped("as in datasets")
    return left_out("the evaluation set is read as the first of datasets is")


# A single data set is spelled flat, so that the command line can replace it.
FLAT = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
FLAT |= {"column_map": "column_map", "role_map": "role_map"}


def finish(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipe keys for the blocks of all data sets."""
    blocks = [block for block in blocks if "path" in block]
    if len(blocks) == 1 and blocks[0].keys() <= FLAT.keys():
        return {FLAT[key]: value for key, value in blocks[0].items()}
    return {"datasets": blocks} if blocks else {}
