"""A chat template as a program: its limits, the forms that it takes, and the marks by which its output is read.

A template is often a stranger's. Jinja's sandbox keeps it from files and from the interpreter, and `range` below
100,000. It does not end nested loops, macros that call each other twice, or `{{ 'a' * 10**10 }}`, which it computes
while it compiles. So each rendering has limits of time, memory and length.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.data.conversation import REASONING, Message
from stepladder.data.formats import BESIDE_MESSAGES, Example
from stepladder.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ = {"role", "content", "tool_calls", *REASONING}  # the keys of a message that every template is given
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys are read without being named.
WHOLE_MESSAGE = re.compile(r"\bmessages?\s*\|\s*(?:tojson|string|pprint|list|items|map|dictsort)|\bmessage\.items\b")
MAX_SECONDS = 5.0  # of processor time, for one conversation; a template in use takes less than a thousandth
MAX_MEMORY = 512 << 20  # bytes beyond what the process has
MAX_CHARACTERS = 10_000_000  # of a conversation's text, where that is more than MAX_GROWTH the row's own
MAX_GROWTH = 10
MAX_SOURCE = 1 << 20  # characters of the template itself
TICK = 0.25  # seconds between two looks at the clock
# Both cases and digits, so that a filter that changes a text changes the mark; drawn, so that no text looks like one.
BEGINS = f"a{secrets.token_hex(2)}Q"
MARK = re.compile(BEGINS + r"(\d+|X)b*Z")
OTHER = f"{BEGINS}XZ"  # the mark of a text that is none of the conversation's
# Tags at the edges of a text, but for what other tokenizers' special tokens look like.
OPENING = re.compile(r"<(?!s>|bos>|eos>|start_of_turn>|end_of_turn>)[A-Za-z][\w:.-]{0,39}>\s*")
CLOSING = re.compile(r"\s*</(?!s>)[A-Za-z][\w:.-]{0,39}>$")
EDGES = " \t\n<>"  # what the edges of a text may begin or end with
THOUGHT_END = "</think>"


class Refusal(Exception):
    """The template cannot render this conversation; the text says why."""


class Dialect(NamedTuple):
    """How a template takes what has more than one form. The plainest that renders every text is used."""

    parts: bool = False  # a text is a list of parts: [{"type": "text", "text": …}]
    text_arguments: bool = False  # a call's arguments are JSON text, not an object
    empty_tools: bool = False  # no tools are an empty list
    training: bool = False  # TRL's version for training stands in for the template


def dialects(marked: Example, training: bool) -> list[Dialect]:
    """The forms that a template may want of a conversation with marks, the plainest first."""
    calls = any("tool_calls" in message for message in marked["messages"])
    forms = itertools.product((False, True), (False, True)[: 1 + calls], (False, True)[: 2 - ("tools" in marked)])
    return sorted((Dialect(*form, training) for form in forms), key=sum)


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
                with limit_resources():
                    self._training = get_training_chat_template(self.tokenizer) or ""
            except LimitExceeded:
                raise
            except Exception:  # it renders conversations of its own to find out, which this template may refuse
                self._training = ""
        return self._training

    def text(self, example: Example, dialect: Dialect, prompt: bool = False) -> str:
        """The conversation as the template renders it, with the generation prompt at its end where `prompt` is.

        Raises:
            Refusal: the template raises an error.
            LimitExceeded: it takes more time or memory than it may, or makes too long a text.
        """
        text = str(self._apply(self.tokenizer.apply_chat_template, example, dialect, prompt, tokenize=False))
        if len(text) > MAX_CHARACTERS and len(text) > MAX_GROWTH * len(str(example)):
            raise LimitExceeded(f"the chat template makes {len(text):,} characters of one conversation")
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
            with limit_resources():
                return render(messages, chat_template=template, add_generation_prompt=prompt, **kwargs)
        except LimitExceeded:
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


class LimitExceeded(ModelError):
    """The template takes more than it may; no other row would fare better, so none is skipped for it."""

    def __init__(self, what: str, **rest: Any):
        super().__init__(what, **{"help": "another one, such as chat_template: chatml", **rest})


class _Stop(BaseException):
    """Not an Exception: Jinja takes those for expressions that are no constants."""


class limit_resources:
    """Raise LimitExceeded where the block takes more than `MAX_SECONDS` or `MAX_MEMORY`.

    Time is limited in the main thread only, memory on Linux only, neither on native Windows. The
    limits are the process's own while the block runs: no other thread may need much memory meanwhile. 13 µs a block, so
    each rendering can have its own.
    """

    _began = math.inf  # processor time of the main thread at which the block that runs began

    def __enter__(self) -> None:
        if sys.platform == "win32":  # no timer of processor time, and no limit of memory
            return
        import resource

        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            if signal.getsignal(signal.SIGVTALRM) is not _check_time:
                signal.signal(signal.SIGVTALRM, _check_time)
            limit_resources._began = time.thread_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
        self._memory = resource.getrlimit(resource.RLIMIT_AS)
        if (held := _address_space()) is not None:
            soft, hard = self._memory
            most = held + MAX_MEMORY
            within = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(most, *within) if within else most, hard))

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if sys.platform != "win32":
            import resource

            if self._is_main:
                limit_resources._began = math.inf
            resource.setrlimit(resource.RLIMIT_AS, self._memory)
            if self._is_main:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if isinstance(error, _Stop):
            raise LimitExceeded(f"the chat template takes more than {MAX_SECONDS:g} s for one conversation") from None
        if isinstance(error, MemoryError):
            raise LimitExceeded(
                f"the chat template takes more than {MAX_MEMORY >> 20} MiB of memory for one conversation"
            ) from None


def _check_time(number: int, frame: FrameType | None) -> None:
    # The timer counts the processor time of all threads, OpenMP's busy waiting included.
    if time.thread_time() - limit_resources._began > MAX_SECONDS:
        raise _Stop


def _address_space() -> int | None:
    """Bytes that the process has mapped; None where it cannot be told."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(64).split()[0]) * mmap.PAGESIZE
    except (OSError, ValueError):
        return None


class Slot(NamedTuple):
    """A text of a conversation: the number of its message, what it is, and whether it must be rendered."""

    message: int
    kind: str  # content, result (of a tool), reasoning, name, argument or id
    text: str
    required: bool = True
    edges: tuple[str, str] = ("", "")  # white space and tags around the text, which stay where the mark is put


def plain_slots(example: Example) -> list[Slot] | None:
    """The texts of a conversation whose form is its roles alone, as nearly all are; None of any other."""
    if not example.keys() <= {"messages", "prompt_messages"}:
        return None
    slots = []
    for number, message in enumerate(example["messages"]):
        text = message["content"]
        if len(message) != 2 or not text or text[0] in EDGES or text[-1] in EDGES or THOUGHT_END in text:
            return None
        slots.append(Slot(number, "result" if message["role"] == "tool" else "content", text))
    return None if any(slot.text != slot.text.strip() for slot in slots) else slots


class _Marker:
    """Puts a mark in place of each text of a conversation, and lists the texts as slots."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.ids: dict[str, str] = {}

    def put(self, message: int, kind: str, text: str, edges: tuple[str, str] = ("", "")) -> str:
        self.slots.append(Slot(message, kind, text, edges=edges))
        return f"{BEGINS}{len(self.slots) - 1}Z"

    def put_id(self, message: int, text: str) -> str:
        """Ids are compared by templates (a result with its call), and checked for their length (Mistral)."""
        own = f"{BEGINS}{len(self.slots)}".ljust(len(text) - 1, "b") + "Z"
        if text not in self.ids and len(own) == len(text):
            self.slots.append(Slot(message, "id", text, required=False))
            self.ids[text] = own
        return self.ids.get(text, text)

    def put_text(self, message: int, kind: str, text: str) -> str:
        """The white space and the tags at the edges of a text stay: templates strip and look for them."""
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        if opening := OPENING.match(text, first, last):
            first = opening.end()
        if closing := CLOSING.search(text[max(first, last - 80) : last]):
            last -= len(closing[0])
        if first >= last:  # nothing but a tag
            first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        if first >= last:
            return text
        edges = text[:first], text[last:]
        return self.put(message, kind, text[first:last], edges).join(edges)

    def put_content(self, message: int, role: str, text: str) -> str:
        """An answer that holds a thought is two texts, the first of which a template may drop."""
        if role == "assistant" and text.count(THOUGHT_END) == 1:
            thought, end, answer = text.partition(THOUGHT_END)
            parts = self.put_text(message, "reasoning", thought), self.put_text(message, "content", answer)
            if parts != (thought, answer):  # else there is neither
                return parts[0] + end + parts[1]
        return self.put_text(message, "result" if role == "tool" else "content", text)

    def put_leaves(self, message: int, value: Any) -> Any:
        if isinstance(value, str):
            return self.put(message, "argument", value) if value else value
        if isinstance(value, dict):
            return {key: self.put_leaves(message, item) for key, item in value.items()}
        return [self.put_leaves(message, item) for item in value] if isinstance(value, list) else value

    def put_call(self, message: int, call: dict[str, Any]) -> dict[str, Any]:
        function = {**call["function"], "name": self.put(message, "name", call["function"]["name"])}
        function["arguments"] = self.put_leaves(message, function["arguments"])
        marked = {**call, "function": function}
        return {**marked, "id": self.put_id(message, call["id"])} if isinstance(call.get("id"), str) else marked

    def put_message(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        marked = {key: value for key, value in message.items() if key != "train"}
        if len(message) > 2:
            for key in set(REASONING).intersection(message):
                if isinstance(message[key], str):
                    marked[key] = self.put_text(number, "reasoning", message[key])
            if isinstance(message.get("tool_call_id"), str):
                marked["tool_call_id"] = self.put_id(number, message["tool_call_id"])
        marked["content"] = self.put_content(number, message["role"], message["content"])
        if "tool_calls" in message:
            marked["tool_calls"] = [self.put_call(number, call) for call in message["tool_calls"]]
        return marked


def mark(example: Example) -> tuple[list[Slot], Example]:
    """The texts of a conversation, and the conversation with a mark in place of each."""
    marker = _Marker()
    messages = [marker.put_message(number, message) for number, message in enumerate(example["messages"])]
    return marker.slots, {**{key: example[key] for key in BESIDE_MESSAGES if key in example}, "messages": messages}


def parts(text: str) -> tuple[list[str], list[int]]:
    """The literals between the marks of a rendered text, and the numbers of the marks."""
    pieces = MARK.split(text)
    return pieces[::2], [int(number) for number in pieces[1::2] if number != "X"]


def json_forms(text: str) -> dict[str, None]:
    """A text as it stands, and as a string in JSON, where `tojson` may escape more or less."""
    return dict.fromkeys((text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))))
