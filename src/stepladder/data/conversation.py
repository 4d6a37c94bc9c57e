"""Turns of a conversation, checked and brought into the form that chat templates take."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from stepladder import files
from stepladder.data.readers import is_unicode, parse_nested, quote
from stepladder.errors import DataError
from stepladder.suggest import suggest

Message = dict[str, Any]

NAMES: dict[str, Any] = files.read_table("data/names.yaml")


def invert_names(names: dict[str, list[str]]) -> dict[str, str]:
    """What each name stands for, from the names of each."""
    return {name: meant for meant, listed in names.items() for name in listed}


ROLES, LIKELY_ROLES = invert_names(NAMES["roles"]), invert_names(NAMES["likely_roles"])
REASONING = ("reasoning_content", "reasoning", "thinking")
# Of ms-swift, LLaMA-Factory, Axolotl, OpenAI, verl.
MASKS = ("loss", "loss_weight", "loss_scale", "loss_mask", "training", "trainable", "train", "weight")
ARGUMENTS = ("parameters", "params", "args", "input")  # what a tool call's arguments are called elsewhere
PARTIAL_MASKS = ("training_detail", "train_detail")  # Axolotl's, for parts of a turn
UNCLEAR_MASKS = ("mask", "masked")  # true leaves a turn out in one tool, and trains it in another
CALL_ROLES = ("function_call", "tool_call")  # whose text is the call
ON, OFF = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
READ_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *REASONING, *MASKS, *PARTIAL_MASKS}
# The keys of a finished message whose meaning chat templates share.
KNOWN_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "train", *REASONING})
MAY_BE_EMPTY = ("system", "developer", "tool")  # a template's own system prompt switched off; a tool that says nothing
MEDIA_PARTS = ("image", "audio", "video", "file")
YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null")  # which YAML does not take for text
FILL_IN = "remove the row or fill it in"


@dataclass
class RoleMap:
    """The recipe's `role_map`, and which of its names have occurred."""

    roles: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def known(self, name: Any) -> Any:
        """The known role that `name` stands for; the name itself where the map does not hold it."""
        if not isinstance(name, str) or name not in self.roles:
            return name
        self.seen.add(name)
        return self.roles[name]


def text(value: Any, role: str, column: str, may_be_empty: bool = False) -> str:
    """A text as it is, or the text parts of a list joined.

    Raises:
        DataError: missing, empty, not text, half a character, or a part that is not text.
    """
    if isinstance(value, str):
        if (not value or value.isspace()) and not may_be_empty:
            raise DataError(f"the {role}'s text ('{column}') is empty", help=FILL_IN)
        if not is_unicode(value):
            raise DataError(
                f"the {role}'s text ('{column}') holds half a character (a lone surrogate)",
                why="such halves come of cutting a text in the middle of an emoji",
                help="cut it elsewhere, or remove the row",
            )
        return value
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        raise DataError(
            f"the {role}'s text ('{column}') is a list of {len(value)} texts: {quote(value)}",
            help="choose one of them, or make a row of each",
        )
    if isinstance(value, list):
        return text("".join(_part(part) for part in value), role, column, may_be_empty)
    if value is None:
        raise DataError(f"the {role}'s text ('{column}') is missing", help=FILL_IN)
    raise DataError(
        f"the {role}'s text ('{column}') is not text but {quote(value)}",
        help='put it in quotes: "42"' if isinstance(value, int | float) else "a text in quotes",
    )


def _part(part: Any) -> str:
    name = part.get("type", "text") if isinstance(part, dict) else None
    if name == "text" and isinstance(part.get("text"), str):
        if mask := next((key for key in MASKS if part.get(key) is not None), None):
            raise _partial_mask(f"a content part has '{mask}'")
        return part["text"]
    if isinstance(name, str) and any(media in name for media in MEDIA_PARTS):
        raise multimodal(f"a content part of the type '{name}'")
    raise DataError(f"a content part is not text: {quote(part)}", help='{"type": "text", "text": "…"}')


def multimodal(what: str) -> DataError:
    return DataError(
        f"multimodal: {what}",
        why="Stepladder trains on text",
        help="remove the row, or remove what is not text from it",
    )


def conversation(value: Any, role_map: RoleMap | None = None) -> list[Message]:
    """Messages in the chat templates' form, from theirs or ShareGPT's (`from`, `value`).

    A turn that the data excludes from training (`loss: false`, `weight: 0`, …) carries `"train": False`.

    Raises:
        DataError: not a list of messages, an empty one, or a message that cannot be read.
    """
    value = parse_nested(value, "the conversation")  # a text, as CSV must have it
    if not isinstance(value, list):
        raise DataError(f"the conversation is not a list but {quote(value)}", help="a list of messages")
    if not value:
        raise DataError("an empty conversation", help=FILL_IN)
    return [_message(item, role_map) for item in value]


def _message(item: Any, role_map: RoleMap | None) -> Message:
    name = (item.get("role") or item.get("from")) if isinstance(item, dict) else None
    if name is None:
        raise DataError(f"a message has no 'role': {quote(item)}", help='{"role": "user", "content": "…"}')
    if role_map:
        name = role_map.known(name)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise _unknown_role(name)
    key = "content" if "content" in item or "value" not in item else "value"
    content = item.get(key)
    if len(item) == 2 and key in item and name not in CALL_ROLES:  # nearly all messages
        return {"role": role, "content": text(content, role, key, role in MAY_BE_EMPTY)}
    _check_twins(item)
    if content is None:
        content = item.get("value")
    calls: Any = item.get("tool_calls") or item.get("function_call")
    if name in CALL_ROLES and not calls:
        calls, content = content, ""
    calls = parse_nested(calls, f"the {name}" if name in CALL_ROLES else "'tool_calls'")
    if calls and role != "assistant":
        raise DataError(f"the {role} calls tools", help="only the assistant has 'tool_calls'")
    if calls and content is None:
        content = ""
    message: Message = {"role": role, "content": text(content, role, key, bool(calls) or role in MAY_BE_EMPTY)}
    if calls:
        message["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    message |= _reasoning(item, role)
    if not _is_trained(item, role):
        message["train"] = False
    for other, value in item.items():
        if value is not None and other not in READ_KEYS:
            message |= plain({other: value}, f"a message's {quote(other)}")
    return message


def _unknown_role(name: Any) -> DataError:
    help = suggest(str(name), ROLES)
    if isinstance(name, str):
        near = re.search("'(.+?)'", help)
        likely = LIKELY_ROLES.get(name.strip().lower()) or (near[1] if near else "ROLE")
        rest = f", with one of {', '.join(dict.fromkeys(ROLES.values()))} for ROLE" * (likely == "ROLE")
        help += f"{' ' * bool(help)}in the recipe: role_map: {{{yaml_name(name)}: {likely}}}{rest}"
    return DataError(f"unknown role {quote(name)}", why=f"known: {', '.join(ROLES)}", help=help or "rename it")


def _check_twins(item: Message) -> None:
    """Refuse a message that says one thing under two names, differently: one of them would be lost."""
    for one, other in (("role", "from"), ("content", "value"), ("tool_calls", "function_call")):
        if item.get(one) and item.get(other) and item[one] != item[other]:
            if one == "role" and ROLES.get(str(item[one])) == ROLES.get(str(item[other]), ""):
                continue
            raise DataError(f"a message has both '{one}' and '{other}', and they differ", help="remove one of them")


def _reasoning(item: Message, role: str) -> Message:
    """The one reasoning key of a message, under its own name; blank ones are left out.

    Raises:
        DataError: two that differ; not text; of another role than the assistant.
    """
    found = {key: item[key] for key in REASONING if item.get(key) not in (None, "", [])}
    found = {key: text(value, role, key, may_be_empty=True) for key, value in found.items()}
    found = {key: value for key, value in found.items() if value.strip()}
    if not found:
        return {}
    key, value = next(iter(found.items()))
    if other := next((name for name in found if found[name] != value), None):
        raise DataError(f"a message has both '{key}' and '{other}', and they differ", help="remove one of them")
    if "</think>" in str(item.get("content") or item.get("value") or ""):
        raise DataError(f"a message has '{key}', and another thought in its text (</think>)", help="one of them")
    if role != "assistant":
        raise DataError(f"the {role} has '{key}'", help="only the assistant's turns have reasoning")
    return {key: value}


def _is_trained(item: Message, role: str) -> bool:
    """What the mask keys of a message say; True where it has none.

    Raises:
        DataError: a weight other than 0 and 1; a mask of parts of a turn; two masks that contradict
            each other; a turn of another role than the assistant that is to be trained.
    """
    for key in PARTIAL_MASKS:
        if item.get(key):
            raise _partial_mask(f"a message has '{key}'")
    for key in UNCLEAR_MASKS:
        if item.get(key) is not None:
            raise DataError(
                f"a message has '{key}': {quote(item[key])}",
                why="in some tools true leaves a turn out, in others it trains the turn",
                help="train: false on the turns that are context only",
            )
    found = {key: _mask(key, item[key]) for key in MASKS if item.get(key) is not None}
    if not found:
        return True
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key}: {quote(item[key])}" for key in found)
        raise DataError(f"a message's mask keys contradict each other ({said})", help="keep one")
    key, trained = next(iter(found.items()))
    if trained and role != "assistant":
        raise DataError(
            f"the {role}'s turn is to be trained ({key}: {quote(item[key])})",
            why="only the assistant's turns are trained",
            help=f"remove '{key}' from it; train_on: everything trains every turn",
        )
    return trained or role != "assistant"


def _partial_mask(what: str) -> DataError:
    why = "a turn is trained whole or not at all"
    return DataError(what, why=why, help="train: false on the whole message, or none")


def _mask(key: str, value: Any) -> bool:
    if isinstance(value, str | bool | int | float):
        name = str(value).strip().lower() if not isinstance(value, int) or value in (0, 1) else ""
        if name in ON + OFF:
            return name in ON
    raise DataError(
        f"a message's '{key}' is {quote(value)}",
        why="a turn is trained or not: weights other than 0 and 1 are not implemented",
        help=f"{key}: true or false, 1 or 0",
    )


def _call(call: Any) -> dict[str, Any]:
    """One tool call, its arguments an object: a template would put a text in quotes once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        form = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'
        raise DataError(f"a tool call has no name: {quote(call)}", help=form)
    arguments = function.get("arguments") or {}
    if not arguments and (other := next((key for key in ARGUMENTS if function.get(key)), None)):
        raise DataError(f"a tool call has '{other}' and no 'arguments'", help="rename it: 'arguments'")
    arguments = parse_nested(arguments, "a tool call's arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"a tool call's arguments are not an object but {quote(arguments)}", help='{"city": "Rome"}')
    outer = call if "function" in call else {}
    return plain({**outer, "type": "function", "function": {**function, "arguments": arguments}}, "a tool call")


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The tools of a row, each as `{"type": "function", "function": {"name": …}}`.

    Raises:
        DataError: not a list of objects, or a tool without a name.
    """
    tools = parse_nested(value, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"'tools' is not a list of objects but {quote(tools)}", help="a JSON schema each")
    return [plain(_tool(tool), "'tools'") for tool in tools]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    kind = tool.get("type", "function") if "function" in tool else "function"
    if kind != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        form = '{"type": "function", "function": {"name": "…", "parameters": {…}}}'
        raise DataError(f"a tool is not a function with a name: {quote(tool)}", help=form)
    outer = tool if "function" in tool else {}
    if function is tool:  # `{"type": "function", "name": …}`, as OpenAI's Responses API has it
        function = {key: value for key, value in tool.items() if (key, value) != ("type", "function")}
    return {"type": "function", **outer, "function": function}


def put_system(value: Any, messages: list[Message]) -> None:
    if messages[0]["role"] in ("system", "developer"):
        raise DataError("two system prompts: the column 'system' and the conversation's own", help="remove one of them")
    messages.insert(0, {"role": "system", "content": text(value, "system", "system")})


def plain(value: Any, what: str) -> Any:
    """The value itself, once it is sure that JSON and a tokenizer can take it."""
    try:
        json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise TypeError  # JSON would turn the key into text
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{what} holds what JSON cannot: {quote(value)}", help=FILL_IN) from None
    return value


def yaml_name(name: str) -> str:
    """A name as a hint writes it into a YAML mapping."""
    if re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in YAML_WORDS:
        return name
    plain_characters = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in name)
    return f'"{"".join(plain_characters)}"'
