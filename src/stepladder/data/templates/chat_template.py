"""A chat template as a program: which forms it takes, which keys it reads, and what it renders of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.data.conversation import REASONING, Message
from stepladder.data.templates import limits
from stepladder.data.templates.marks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ = {"role", "content", "tool_calls", *REASONING}  # the keys of a message that every template is given
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys are read without being named.
WHOLE_MESSAGE = re.compile(r"\bmessages?\s*\|\s*(?:tojson|string|pprint|list|items|map|dictsort)|\bmessage\.items\b")


class Refusal(Exception):
    """The template cannot render this conversation; the text says why."""


class Dialect(NamedTuple):
    """How a template takes what has more than one form. The plainest that renders every text is used."""

    parts: bool = False  # a text is a list of parts: [{"type": "text", "text": …}]
    text_arguments: bool = False  # a call's arguments are JSON text, not an object
    empty_tools: bool = False  # no tools are an empty list
    training: bool = False  # TRL's version for training stands in for the template


class TemplateProgram:
    """A tokenizer's chat template as a program: what it renders of a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.source = source(tokenizer)
        self.with_tools = source(tokenizer, "tool_use") or self.source  # as Transformers chooses among named templates
        self.special = special_tokens(tokenizer)
        self.marked = GENERATION.search(self.source) is not None  # it says itself what is trained
        self._read: dict[str, bool] = {}
        self._training: str | None = None

    @property
    def training(self) -> str:
        """TRL's version of this template for training, "" where it ships none."""
        if self._training is None:
            from trl.chat_template_utils import get_training_chat_template

            try:
                with limits.enforce():
                    self._training = get_training_chat_template(self.tokenizer) or ""
            except limits.Exceeded:
                raise
            except Exception:  # it renders conversations of its own to find out, which this template may refuse
                self._training = ""
        return self._training

    def text(self, example: Example, dialect: Dialect, prompt: bool = False) -> str:
        """The conversation as the template renders it, with the generation prompt at its end where `prompt` is.

        Raises:
            Refusal: the template raises an error.
            limits.Exceeded: it takes more time or memory than it may, or makes too long a text.
        """
        text = str(self._apply(self.tokenizer.apply_chat_template, example, dialect, prompt, tokenize=False))
        limits.check_length(text, example)
        return text

    def generated(self, example: Example, dialect: Dialect) -> list[tuple[int, int]]:
        """The characters inside the `{% generation %}` blocks of the template."""
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: list[Message], **kwargs: Any) -> Any:
            return render_jinja_template([messages], return_assistant_tokens_mask=True, **kwargs)

        tokens = self.tokenizer.special_tokens_map
        return [(start, end) for start, end in self._apply(render, example, dialect, False, **tokens)[1][0]]

    def _apply(
        self, render: Callable[..., Any], example: Example, dialect: Dialect, prompt: bool, **kwargs: Any
    ) -> Any:
        messages = [self._message(message, dialect) for message in example["messages"]]
        kwargs |= example.get("chat_template_kwargs") or {}
        kwargs |= {"tools": example.get("tools") or ([] if dialect.empty_tools else None)}
        template = self.with_tools if kwargs["tools"] else self.source
        template = self.training if dialect.training else template
        try:
            with limits.enforce():
                return render(messages, chat_template=template, add_generation_prompt=prompt, **kwargs)
        except limits.Exceeded:
            raise
        except Exception as error:  # Jinja's own errors, and whatever its expressions raise
            raise Refusal(str(error).strip() or type(error).__name__) from None

    def _message(self, message: Message, dialect: Dialect) -> Message:
        """A message in the dialect, without the keys that the template does not read."""
        if len(message) == 2 and not dialect.parts:  # nearly all
            return message
        taken = {key: value for key, value in message.items() if key in READ or (key != "train" and self.reads(key))}
        if dialect.parts and isinstance(taken.get("content"), str):
            taken["content"] = [{"type": "text", "text": taken["content"]}] if taken["content"] else []
        if dialect.text_arguments and "tool_calls" in taken:
            taken["tool_calls"] = [_with_text_arguments(call) for call in taken["tool_calls"]]
        return taken

    def reads(self, key: str) -> bool:
        """Whether the template names this key; one that it does not name cannot change what it renders."""
        if key not in self._read:
            source = self.source + self.with_tools
            self._read[key] = self.names(key) or bool(WHOLE_MESSAGE.search(source))
        return self._read[key]

    def names(self, word: str) -> bool:
        """Whether the word stands in the template."""
        return bool(re.search(rf"\b{re.escape(word)}\b", self.source + self.with_tools))


def source(tokenizer: PreTrainedTokenizerBase, name: str = "default") -> str:
    """The Jinja text of a tokenizer's template, or of the one with this name where there are several."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        return str(template.get(name, ""))
    return template if name == "default" else ""


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text (BOS), none for most."""
    whole, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare), [])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds the special tokens of a tokenizer in a text, the longest first."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found |= {str(tokenizer.eos_token)} if tokenizer.eos_token else set()
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}
