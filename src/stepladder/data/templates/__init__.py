"""The chat template that a conversation is rendered by: the model's own, or one that the recipe names.

A `prompt_template` for a base model becomes a chat template too, so that training, generation,
merging and serving all render alike from the tokenizer that is saved with the result.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder import files, installation
from stepladder.data import special_tokens
from stepladder.data.special_tokens import NewToken
from stepladder.data.templates.chat_template import (
    MAX_SOURCE,
    LimitExceeded,
    Refusal,
    beginning,
    limit_resources,
    mark,
    source,
)
from stepladder.data.templates.layout import ChatTemplate, TemplateLayout
from stepladder.errors import ModelError, RecipeError, first_line, locate_errors
from stepladder.settings import Settings
from stepladder.suggest import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).parent
# What looks like a special token: <|im_end|>, <｜end▁of▁sentence｜>, <turn|>, <end_of_turn>, [e~[, </s>
TURN_TOKEN = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]?>|<[A-Za-z_]{1,40}\|>|<(?:start|end)_of_(?:turn|utterance)>|\]~!?b[\[\]]|\[e~\[|</s>"
)
TEMPLATE_KEYS = ("chat_template", "chat_template_path", "prompt_template")
USER, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
# The shortest conversations of two turns; some templates demand a system turn.
SHORTEST = ([USER, ANSWER] * 2, [{"role": "system", "content": "system"}, *[USER, ANSWER] * 2])


def prepare(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[NewToken]:
    """Give the tokenizer the recipe's special tokens, its template, and the tokens that this one needs.

    Returns:
        The tokens that were added to the vocabulary: the model needs rows of its embeddings for them.

    Raises:
        RecipeError: an unknown template or token, or a template that is not valid Jinja.
        ModelError: the model's own template is not valid Jinja.
    """
    new = special_tokens.add_from_recipe(tokenizer, settings)  # of which the next two keys may name one
    for key in ("eos_token", "pad_token"):
        if token := settings.get(key):
            if token not in tokenizer.get_vocab():
                raise RecipeError(
                    f"{key} '{token}' is not in the model's vocabulary", where=settings.where(key), help="remove it"
                )
            setattr(tokenizer, key, token)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the model's tokenizer has no end token, so no answer would end", help="eos_token: one of its tokens"
        )
    key = next((key for key in TEMPLATE_KEYS if settings.get(key)), "")
    if not key:
        own = tokenizer.chat_template
        if isinstance(own, dict) and "default" not in own:
            names = ", ".join(own)
            raise ModelError(
                f"the model has chat templates ({names}), none of them its default", help="chat_template: NAME"
            )
        _check_syntax(source(tokenizer))
        return new
    value = settings.get(key)
    with locate_errors(settings.where(key)):
        if key == "chat_template_path":
            template = from_path(value)
        elif key == "prompt_template":
            template = from_prompt_template(value)
        else:
            template = value if is_inline(value) else source(tokenizer, value) or load_template(value)
        _check_syntax(template, value if key == "chat_template_path" else key)
    tokenizer.chat_template = template
    new += [] if key == "prompt_template" else _add_turn_tokens(tokenizer)
    if key == "prompt_template" or (key == "chat_template" and not is_inline(value)):
        _begin_as_texts(tokenizer)
    return new


def is_inline(value: str) -> bool:
    """Whether `chat_template` holds a template itself (as TRL's and alignment-handbook's recipes do), not a name."""
    return "{%" in value or "{{" in value


def load_template(name: str) -> str:
    """A template by its name.

    Raises:
        RecipeError: there is none of this name.
    """
    known = load_named_templates()
    if name not in known:
        help = f"chat_template_path: {name}" if os.path.exists(name) else suggest(name, known)
        help = help or f"one of {', '.join(sorted(known))}; or a template in Jinja"
        raise RecipeError(f"there is no chat template '{name}'", help=help)
    return known[name]


def load_named_templates() -> dict[str, str]:
    """The templates that have a name: chatml, mistral and zephyr are ours, the others are TRL's."""
    from trl import chat_template_utils

    suffix = "_chat_template"
    trl = {
        key.removesuffix(suffix): value
        for key, value in vars(chat_template_utils).items()
        if key.endswith(suffix) and isinstance(value, str) and not key.endswith(f"_training{suffix}")
    }
    return trl | {file.stem: file.read_text(encoding="utf-8") for file in HERE.glob("*.jinja")}


def name_of(template: str | None) -> str:
    """What a template is called, where it is one of ours."""
    if template is None:
        return "none: it continues text"
    own = [file.stem for file in HERE.glob("*.jinja") if file.read_text(encoding="utf-8").strip() == template.strip()]
    return own[0] if own else f"its own, {len(template)} characters"


def check_path(settings: Settings) -> None:
    """What is wrong with `chat_template_path`, as far as it shows without the libraries: see `from_path`."""
    if path := settings.get("chat_template_path"):
        with locate_errors(settings.where("chat_template_path")):
            _read_path(path)


def from_path(path: str) -> str:
    """A Jinja file, or the template of another model's tokenizer (TRL's `chat_template_path`).

    Raises:
        RecipeError: no such file, or one that cannot be read.
        ModelError: no such model, or one without a template.
    """
    if (text := _read_path(path)) is not None:
        return text
    from transformers import AutoTokenizer

    try:
        template = source(AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ModelError(f"no template at '{path}': {first_line(error)}") from None
    if not template:
        raise ModelError(f"the tokenizer at '{path}' has no chat template")
    return template


def _read_path(path: str) -> str | None:
    """The text of a file; None for a folder, and for a name that can be a hub id."""
    file = installation.locate(path)
    try:
        if os.path.isdir(file):
            files.check_model_folder(file)
            return None
        if os.path.lexists(file):
            return files.read_text(file, encoding="utf-8")
    except ValueError as error:
        raise RecipeError(f"the chat template {path} cannot be read: {error}") from None
    if path.endswith((".jinja", ".jinja2", ".j2", ".txt")) or path.startswith(("/", ".", "~")):
        raise RecipeError(f"there is no file {path}", why=installation.places(path), help="check the path")
    return None


def from_prompt_template(template: str) -> str:
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
            why=f"found {template!r}",
            help='"### User: {input}\\n### Assistant: "',
        )
    before, after = template.split("{input}")
    prompt_end = after.rstrip()
    gap = after[len(prompt_end) :]

    def quote_for_jinja(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)  # a JSON string is a Jinja string

    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {quote_for_jinja(before)} + message['content'] + {quote_for_jinja(prompt_end)} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {quote_for_jinja(gap)} + message['content'] + eos_token -}}}}"
        "{%- else -%}{{- raise_exception('a prompt_template renders user and assistant turns only') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


def _check_syntax(template: str, name: str = "") -> None:
    """Raise RecipeError, or ModelError for the model's own template (no `name`), if it is not valid Jinja."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    if len(template) > MAX_SOURCE:
        raise LimitExceeded(f"the chat template has {len(template):,} characters, and {MAX_SOURCE:,} is the most")
    try:
        with limit_resources():
            render_jinja_template([], chat_template=template)  # compiles it, and renders nothing
    except (TemplateError, RecursionError) as error:
        kind = RecipeError if name else ModelError
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        reason = error.message if isinstance(error, TemplateError) else "nested too deeply"
        raise kind(
            f"{name or 'the chat template of the model'} is not valid Jinja{line}: {reason}",
            help="correct it, or chat_template: chatml",
        ) from None


def _add_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[NewToken]:
    """Add the template's turn tokens where the answer ends by one of them and the vocabulary lacks it.

    The end-of-turn token becomes the end of generation, else the model would not stop.
    """
    layout = _shortest(tokenizer)
    if layout is None or not layout.turns:  # of the shortest conversations; the rows may be others
        return []
    ends = TURN_TOKEN.findall(layout.literals[-1])
    between = TURN_TOKEN.findall(layout.literals[layout.turns[0].end.literal])
    if not ends and not between:
        return []  # an answer ends by the tokenizer's own end token
    text = "".join(layout.literals) + _with_tool(tokenizer)
    vocabulary = tokenizer.get_vocab()
    new = special_tokens.add_of_template(
        tokenizer, [token for token in dict.fromkeys(TURN_TOKEN.findall(text)) if token not in vocabulary]
    )
    if ends:  # else an answer ends by what opens the next turn (GLM)
        tokenizer.eos_token = ends[0]
    return new


def _begin_as_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a conversation begin as the tokenizer begins every text (BOS), where the template does not write it."""
    begin, layout = beginning(tokenizer), _shortest(tokenizer)
    text = tokenizer.decode(begin) if begin else ""
    if layout and not layout.literals[0].startswith(text):
        tokenizer.chat_template = f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}{tokenizer.chat_template}"


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer by the tokenizer's chat template: one, or another at the conversation's end."""
    layout = _shortest(tokenizer) if tokenizer.chat_template else None
    ends = [turn.ends for turn in layout.turns if turn.ends] if layout else []
    return [tokenizer.convert_tokens_to_ids(end) for end in dict.fromkeys(ends)]


def _with_tool(tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation with a tool as the template renders it, "" where it does not."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "tool", "arguments": {"key": "value"}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "tool", "tool_call_id": "abcdefghi", "content": "result"}
    tool = {
        "type": "function",
        "function": {"name": "tool", "description": "A tool.", "parameters": {"type": "object"}},
    }
    try:
        layout = ChatTemplate(tokenizer).layout(*mark({"messages": [USER, calls, result, ANSWER], "tools": [tool]}))
    except Refusal:
        return ""
    return "".join(layout.literals)


def _shortest(tokenizer: PreTrainedTokenizerBase) -> TemplateLayout | None:
    """The layout of the shortest conversation that the template takes."""
    template = ChatTemplate(tokenizer)
    for messages in SHORTEST:
        try:
            return template.layout(*mark({"messages": messages}))
        except Refusal:
            continue
    return None
