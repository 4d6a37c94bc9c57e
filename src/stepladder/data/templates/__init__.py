"""The chat template that a conversation is rendered by: the model's own, or one that the recipe names.

A `prompt_template` for a base model becomes a chat template too, so that training, generation,
merging and serving all render alike from the tokenizer that is saved with the result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder.errors import ModelError, RecipeError
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).parent
TURN_TOKEN = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>")


def prepare(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """Give the tokenizer the template that the recipe asks for, and the tokens that it needs.

    Returns:
        The tokens that were added to the vocabulary; the model's embeddings must grow by them.

    Raises:
        RecipeError: an unknown template or token.
    """
    for key in ("eos_token", "pad_token"):
        if token := settings.get(key):
            if token not in tokenizer.get_vocab():
                raise RecipeError(
                    f"{key} '{token}' is not in the model's vocabulary", where=settings.where(key), way_out="remove it"
                )
            setattr(tokenizer, key, token)
    keys = [k for k in ("chat_template", "chat_template_path", "prompt_template") if settings.get(k)]
    if not keys:
        return []
    (key,) = keys
    value, where = settings.get(key), settings.where(key)
    if key == "prompt_template":
        tokenizer.chat_template = from_prompt_template(value, where)
        return []
    tokenizer.chat_template = named(value, where) if key == "chat_template" else from_path(value, where)
    return _add_turn_tokens(tokenizer)


def named(name: str, where: str = "") -> str:
    """A template by name: chatml, mistral and zephyr are ours, the others are TRL's."""
    own = {file.stem: file for file in HERE.glob("*.jinja")}
    if name in own:
        return own[name].read_text(encoding="utf-8")
    from trl import chat_template_utils

    shipped = {n.removesuffix("_chat_template") for n in vars(chat_template_utils) if n.endswith("_chat_template")}
    known = sorted(n for n in shipped - own.keys() if not n.startswith(("_", "get_")) and not n.endswith("training"))
    if name not in known:
        raise RecipeError(
            f"there is no chat template '{name}'",
            where=where,
            way_out=f"one of {', '.join(sorted(own))}, {', '.join(known)}",
        )
    return str(getattr(chat_template_utils, f"{name}_chat_template"))


def name_of(template: str | None) -> str:
    """What a template is called, where it is one of ours."""
    if template is None:
        return "none: it continues text"
    own = [file.stem for file in HERE.glob("*.jinja") if file.read_text(encoding="utf-8").strip() == template.strip()]
    return own[0] if own else f"its own, {len(template)} characters"


def from_path(path: str, where: str = "") -> str:
    """A Jinja file, or the template of another model's tokenizer (TRL's `chat_template_path`)."""
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        raise ModelError(f"no template at '{path}': {str(error).splitlines()[0]}", where=where) from None
    if not template:
        raise ModelError(f"the tokenizer at '{path}' has no chat template", where=where)
    return str(template)


def from_prompt_template(template: str, where: str = "") -> str:
    """Turn `### User: {input}\\n### Assistant: ` into a chat template.

    White space at its end moves to the answer's side: a prompt that ends in a space is split
    into other tokens than the same text followed by a word, so the model would be asked in a
    way that it was never trained on.

    Raises:
        RecipeError: it does not hold `{input}` exactly once.
    """
    if template.count("{input}") != 1:
        raise RecipeError(
            "prompt_template needs {input} exactly once",
            where=where,
            why=f"found {template!r}",
            way_out='"### User: {input}\\n### Assistant: "',
        )
    before, after = template.split("{input}")
    prompt_end = after.rstrip()
    gap = after[len(prompt_end) :]

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)  # a JSON string is a Jinja string

    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {quoted(before)} + message['content'] + {quoted(prompt_end)} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {quoted(gap)} + message['content'] + eos_token -}}}}"
        "{%- else -%}{{- raise_exception('a prompt_template renders user and assistant turns only') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


def _add_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Add the template's turn tokens where the answer ends by one of them and the vocabulary lacks it.

    The end-of-turn token becomes the end of generation, else the model would not stop.
    """
    answer = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], tokenize=False
    )
    found = TURN_TOKEN.findall(answer)
    ends = TURN_TOKEN.findall(answer[answer.rindex("!") :])
    if not ends:
        return []  # the answer ends by the tokenizer's own end token
    vocabulary = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(found) if token not in vocabulary]
    tokenizer.add_special_tokens({"additional_special_tokens": new} if new else {})
    tokenizer.eos_token = ends[0]
    return new
