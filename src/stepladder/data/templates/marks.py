"""A conversation with marks in place of its texts, and what comes out of a template that renders it."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any, NamedTuple

from stepladder.data.conversation import REASONING

Example = dict[str, Any]

GIVEN = ("tools", "chat_template_kwargs")  # what a template is given beside the messages
# Both cases and digits, so that a filter that changes a text changes the mark; drawn, so that no text looks like one.
BEGINS = f"a{secrets.token_hex(2)}Q"
MARK = re.compile(BEGINS + r"(\d+|X)b*Z")
OTHER = f"{BEGINS}XZ"  # the mark of a text that is none of the conversation's
# Tags at the edges of a text, but for what other tokenizers' special tokens look like.
OPENING = re.compile(r"<(?!s>|bos>|eos>|start_of_turn>|end_of_turn>)[A-Za-z][\w:.-]{0,39}>\s*")
CLOSING = re.compile(r"\s*</(?!s>)[A-Za-z][\w:.-]{0,39}>$")
EDGES = " \t\n<>"  # what the edges of a text may begin or end with
THOUGHT_END = "</think>"


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
    return marker.slots, {**{key: example[key] for key in GIVEN if key in example}, "messages": messages}


def parts(text: str) -> tuple[list[str], list[int]]:
    """The literals between the marks of a rendered text, and the numbers of the marks."""
    pieces = MARK.split(text)
    return pieces[::2], [int(number) for number in pieces[1::2] if number != "X"]


def json_forms(text: str) -> dict[str, None]:
    """A text as it stands, and as a string in JSON, where `tojson` may escape more or less."""
    return dict.fromkeys((text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))))
