"""Turns of a conversation, checked and brought into the form that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from stepladder.data.readers import is_unicode, shown
from stepladder.errors import DataError
from stepladder.suggest import suggest

Message = dict[str, Any]

# ShareGPT's names beside the chat templates' own.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
MAY_BE_EMPTY = ("system", "developer", "tool")  # a template's own system prompt switched off; a tool that says nothing
MEDIA_PARTS = ("image", "audio", "video", "file")
FILL_IN = "remove the row or fill it in"


def text(value: Any, role: str, column: str, where: str, may_be_empty: bool = False) -> str:
    """A text as it is, or the text parts of a list joined.

    Raises:
        DataError: missing, empty, not text, half a character, or a part that is not text.
    """
    if isinstance(value, str):
        if (not value or value.isspace()) and not may_be_empty:
            raise DataError(f"the {role}'s text ('{column}') is empty", where=where, way_out=FILL_IN)
        if not is_unicode(value):
            raise DataError(
                f"the {role}'s text ('{column}') holds half a character (a lone surrogate)",
                where=where,
                why="such halves come of cutting a text in the middle of an emoji",
                way_out="cut it elsewhere, or remove the row",
            )
        return value
    if isinstance(value, list):
        return text("".join(_part(part, where) for part in value), role, column, where, may_be_empty)
    if value is None:
        raise DataError(f"the {role}'s text ('{column}') is missing", where=where, way_out=FILL_IN)
    raise DataError(
        f"the {role}'s text ('{column}') is not text but {shown(value)}",
        where=where,
        way_out='put it in quotes: "42"' if isinstance(value, int | float) else "a text in quotes",
    )


def _part(part: Any, where: str) -> str:
    name = part.get("type", "text") if isinstance(part, dict) else None
    if name == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(name, str) and any(media in name for media in MEDIA_PARTS):
        raise multimodal(f"a content part of the type '{name}'", where)
    raise DataError(f"a content part is not text: {shown(part)}", where=where, way_out='{"type": "text", "text": "…"}')


def multimodal(what: str, where: str) -> DataError:
    return DataError(
        f"multimodal: {what}",
        where=where,
        why="Stepladder trains on text",
        way_out="remove the row, or remove what is not text from it",
    )


def conversation(value: Any, where: str) -> list[Message]:
    """Messages in the chat templates' form, from theirs or ShareGPT's (`from`, `value`)."""
    if isinstance(value, str):  # as CSV must have it
        value = from_json(value, "the conversation", where)
    if not isinstance(value, list):
        raise DataError(f"the conversation is not a list but {shown(value)}", where=where, way_out="a list of messages")
    if not value:
        raise DataError("an empty conversation", where=where, way_out=FILL_IN)
    messages = [_message(item, where) for item in value]
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the conversation ends with the {messages[-1]['role']}, so there is no answer to train",
            where=where,
            way_out="remove its last turn or add an answer",
        )
    return messages


def _message(item: Any, where: str) -> Message:
    name = (item.get("role") or item.get("from")) if isinstance(item, dict) else None
    if name is None:
        raise DataError(
            f"a message has no 'role': {shown(item)}", where=where, way_out='{"role": "user", "content": "…"}'
        )
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"unknown role {shown(name)}",
            where=where,
            why=f"known: {', '.join(ROLES)}",
            way_out=suggest(str(name), ROLES) or "rename it",
        )
    key = "content" if "content" in item or "value" not in item else "value"
    content = item.get(key)
    if len(item) == 2 and key in item and name != "function_call":  # nearly all messages
        return {"role": role, "content": text(content, role, key, where, role in MAY_BE_EMPTY)}
    calls: Any = item.get("tool_calls")
    if name == "function_call":
        calls, content = from_json(content, "the function_call", where), ""
    if calls and role != "assistant":
        raise DataError(f"the {role} calls tools", where=where, way_out="only the assistant has 'tool_calls'")
    if calls and content is None:
        content = ""
    message: Message = {"role": role, "content": text(content, role, key, where, bool(calls) or role in MAY_BE_EMPTY)}
    if calls:
        message["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    for other, value in item.items():
        if value is not None and other not in ("role", "from", "content", "value", "tool_calls"):
            message[other] = plain(value, f"a message's '{other}'", where)
    return message


def _call(call: Any, where: str) -> dict[str, Any]:
    """One tool call, its arguments an object: a template would put a text in quotes once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        form = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'
        raise DataError(f"a tool call has no name: {shown(call)}", where=where, way_out=form)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = from_json(arguments, "a tool call's arguments", where)
    if not isinstance(arguments, dict):
        raise DataError(
            f"a tool call's arguments are not an object but {shown(arguments)}", where=where, way_out='{"city": "Rome"}'
        )
    outer = call if "function" in call else {}
    return plain({**outer, "type": "function", "function": {**function, "arguments": arguments}}, "a tool call", where)


def tools_of(value: Any, where: str) -> list[Any]:
    tools = from_json(value, "'tools'", where) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"'tools' is not a list of objects but {shown(tools)}", where=where, way_out="a JSON schema each"
        )
    return plain(tools, "'tools'", where)


def put_system(value: Any, messages: list[Message], where: str) -> None:
    if messages[0]["role"] in ("system", "developer"):
        raise DataError(
            "two system prompts: the column 'system' and the conversation's own",
            where=where,
            way_out="remove one of them",
        )
    messages.insert(0, {"role": "system", "content": text(value, "system", "system", where)})


def from_json(value: Any, what: str, where: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{what} is not JSON: {shown(value)}", where=where, way_out='a list or object: "[…]"') from None


def plain(value: Any, what: str, where: str) -> Any:
    """The value itself, once it is sure that JSON and a tokenizer can take it."""
    try:
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{what} holds what JSON cannot: {shown(value)}", where=where, way_out=FILL_IN) from None
    return value
