"""From a YAML node to a value of the type that a key takes, with YAML's traps named."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from stepladder import files
from stepladder.errors import RecipeError, RecipeErrors
from stepladder.flags import FP32_MAX
from stepladder.recipe.schema import ANYTHING, Key
from stepladder.suggest import suggest

NUMBER = re.compile(r"[-+]?((0|[1-9][\d_]*)(\.[\d_]*)?|\.\d+)([eE][-+]?\d+)?")
TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
TYPE_NAMES |= {"list": "a list", "dict": "a block of keys", "none": "null"}
# Keys whose values may name a file or a folder.
PATHS = {"model_name_or_path", "chat_template_path", "dataset_name", "eval_dataset_name", "output_dir"}
PATHS |= {"datasets.path", "datasets.data_dir", "datasets.data_files", "run_name"}

# Whether a number is within a range, by the words for the range. The libraries read a number below 1 as a share of
# all, any other as a count.
HOLDS: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "1 or more": lambda x: x >= 1,
    "2 or more": lambda x: x >= 2,
    "from 0 up to, but not including, 1": lambda x: 0 <= x < 1,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "a share below 1, or a whole number from 1 up": lambda x: 0 < x < 1 or (x >= 1 and x % 1 == 0),
    "0, a share below 1, or a whole number from 1 up": lambda x: 0 <= x < 1 or (x >= 1 and x % 1 == 0),
    "-1 (off), or 1 or more": lambda x: x == -1 or x >= 1,
    "from 1 to 1000000": lambda x: 1 <= x <= 1_000_000,
    "from 0 to 4294967295": lambda x: 0 <= x < 2**32,
}
RANGES: dict[str, str] = {
    key: words for words, keys in files.read_table("recipe/keys.yaml")["ranges"].items() for key in keys
}

Pairs = dict[str, tuple[yaml.Node, yaml.Node]]
# Half of a surrogate pair, which YAML's "\\ud800" makes; a byte of a file's name that is no UTF-8 is one of the others.
HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")


@dataclass
class Source:
    """Where nodes were read from, and what was found out while reading them.

    `file` is a path, or what is said in its place for nodes without a line (the command line).
    `origins` gets the place of every key inside a block: `datasets[0].split`.
    """

    file: str
    notes: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def where(self, node: yaml.Node) -> str:
        return position(self.file, node)


def position(file: str, node: yaml.Node | None) -> str:
    """`file:line:column`, both counted from 1 as editors do."""
    mark = getattr(node, "start_mark", None)
    return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file


def unknown_key(name: str, known: list[str], where: str, block: str = "") -> RecipeError:
    return RecipeError(
        f"unknown key '{name}'" + (f" in {block}" if block else ""),
        where=where,
        why=f"{block or 'neither Stepladder nor the installed TRL and Transformers'} "
        f"{'has no such key' if block else 'know it'}, so it would change nothing",
        help=suggest(name, known) or (f"one of {', '.join(known)}" if len(known) <= 12 else "remove it"),
    )


def mapping(node: yaml.Node | None, file: str, errors: list[RecipeError]) -> Pairs:
    """The key and value nodes of a block by name; a key that stands twice is an error."""
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        errors.append(RecipeError("a recipe is a block of `key: value` lines", where=position(file, node)))
        return {}
    pairs: Pairs = {}
    for key_node, value_node in node.value:
        name, where = str(key_node.value), position(file, key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            errors.append(RecipeError("a key is one word", where=where, help="`key: value`"))
        elif key_node.tag == "tag:yaml.org,2002:merge":
            help = "write the keys out, or let the whole recipe start from another with `extends`"
            errors.append(RecipeError("YAML's merge key << is not read", where=where, help=help))
        elif HALF.search(name):
            errors.append(_half_character("a key", where))
        elif name in pairs:
            mark = pairs[name][0].start_mark
            errors.append(
                RecipeError(
                    f"'{name}' stands twice" + (f", first on line {mark.line + 1}" if mark else ""),
                    where=where,
                    why="YAML would silently keep the last one",
                    help="remove one",
                )
            )
        else:
            pairs[name] = (key_node, value_node)
    return pairs


def value(key: Key, node: yaml.Node | None, where: str, source: Source) -> Any:
    """The value of `key` in its own type, checked at every level.

    Raises:
        RecipeError: of another type, not among the allowed values, or out of range.
        RecipeErrors: for the faults inside a block.
    """
    if isinstance(node, yaml.MappingNode) and "dict" in key.types:
        return _block(key, node, where, source)
    if isinstance(node, yaml.SequenceNode) and "list" in key.types:
        return _list(key, node, where, source)
    if not isinstance(node, yaml.ScalarNode):
        found = "a block of keys" if isinstance(node, yaml.MappingNode) else "a list" if node else "nothing"
        if isinstance(node, yaml.MappingNode) and node.flow_style and "str" in key.types:
            raise RecipeError(
                f"{key.name}: YAML reads {{…}} as a block, and this key takes text",
                where=where,
                help=f'put it in quotes: {key.name}: "…"',
            )
        raise _wrong_type(key, found, where)
    if key.nested and node.value.lstrip().startswith("{"):  # JSON in quotes: so TRL takes blocks from a shell
        return value(key, _json(key, node, where), where, Source(where, source.notes, source.origins))
    if not node.value and node.style is None:
        raise RecipeError(
            f"{key.name} has no value",
            where=where,
            why="nothing stands between it and the end of the line; what follows a # is a comment",
            help="remove the key, write null where that is meant, or put a text with a # in quotes",
        )
    result = _scalar(key, node, where, source)
    items = result if isinstance(result, list) else [result]  # one word may stand for a list of it
    for name in (name for name in items if key.choices and isinstance(name, str) and name not in key.choices):
        others = [words for kind, words in TYPE_NAMES.items() if kind in key.types and kind != "str"]
        raise RecipeError(
            f"{key.name}: '{name}' is not an allowed value",
            where=where,
            why=f"allowed: {', '.join([*others, *key.choices])}" if len(key.choices) <= 16 else "",
            help=suggest(name, key.choices),
        )
    if result == "" and key.default != "" and key.types != ANYTHING:
        raise RecipeError(
            f"{key.name} is empty",
            where=where,
            why="an empty text names nothing; a shell variable that is not set leaves one",
            help=f"remove {key.name}, or give it a text",
        )
    if expected := expected_range(key.name, result):
        raise RecipeError(f"{key.name} is {node.value}; it must be {expected}", where=where)
    for text in (text for text in items if isinstance(text, str)):
        if fault := files.name_fault(text) if is_path(key) else "it holds a NUL character" * ("\0" in text):
            shortened = text if len(text) <= 60 else f"{text[:60]}…"
            raise RecipeError(f"{key.name} {shortened!r} cannot be used: {fault}", where=where)
    return _expand_home(result) if is_path(key) else result


def is_path(key: Key) -> bool:
    return re.sub(r"\[\d+\]", "", key.name) in PATHS


def _expand_home(value: Any) -> Any:
    """`~/…` as a shell expands it: here nothing else would, and a folder named `~` would be made."""
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def expected_range(name: str, value: Any) -> str:
    """What the number `value` of the key `name` should be, in words; empty where it is that, or no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not math.isfinite(value):
        return "finite"
    if abs(value) > FP32_MAX:
        return f"at most {FP32_MAX:.2g}, the largest number of fp32"
    if isinstance(value, int) and abs(value) > sys.maxsize:
        return f"at most {sys.maxsize}, as far as a computer counts"
    words = RANGES.get(re.sub(r"\[\d+\]", "", name), "")
    return "" if not words or HOLDS[words](value) else words


def _block(key: Key, node: yaml.MappingNode, where: str, source: Source) -> dict[str, Any]:
    """A block whose keys are known, or (without `nested`) one of free keys whose values have a type."""
    known = {nested.name: nested for nested in key.nested}
    free = Key("", key.owner, key.items or ANYTHING, None)
    errors: list[RecipeError] = []
    result: dict[str, Any] = {}
    for name, (key_node, value_node) in mapping(node, source.file, errors).items():
        at, label = source.where(key_node), f"{key.name}.{name}"
        if known and name not in known:
            errors.append(unknown_key(name, list(known), at, block=key.name))
            continue
        source.origins[label] = at
        try:
            result[name] = value(replace(known.get(name, free), name=label), value_node, at, source)
        except RecipeError as error:
            errors.extend(getattr(error, "errors", [error]))
            result[name] = None  # said, if wrongly: not missing
    for name in (name for name, nested in known.items() if nested.required and name not in result):
        errors.append(RecipeError(f"{key.name} has no '{name}'", where=source.where(node), help=f"{name}: …"))
    if errors:
        raise RecipeErrors(errors)
    return result


def _list(key: Key, node: yaml.SequenceNode, where: str, source: Source) -> list[Any]:
    types = ("dict",) if key.nested else key.items or ANYTHING
    element = Key("", key.owner, types, None, choices=key.choices, nested=key.nested)
    errors: list[RecipeError] = []
    result = []
    for number, item in enumerate(node.value):
        try:
            result.append(value(replace(element, name=f"{key.name}[{number}]"), item, source.where(item), source))
        except RecipeError as error:
            errors.extend(getattr(error, "errors", [error]))
    if errors:
        raise RecipeErrors(errors)
    return result


def drop_positions(node: yaml.Node | None) -> yaml.Node:
    """A node out of a text that is no file: its lines and columns would mislead."""
    assert node is not None
    node.start_mark = node.end_mark = None
    for item in () if isinstance(node, yaml.ScalarNode) else node.value:
        for inner in item if isinstance(item, tuple) else (item,):
            drop_positions(inner)
    return node


def construct(node: yaml.Node) -> Any:
    """A node as Python has it.

    Raises:
        ValueError: its explicit tag, such as !!bool, does not fit what follows.
    """
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(getattr(error, "problem", None) or f"'{node.tag.split(':')[-1]}' does not fit it") from None


def _json(key: Key, node: yaml.ScalarNode, where: str) -> yaml.Node:
    try:
        return drop_positions(files.compose(node.value))
    except yaml.YAMLError:
        raise RecipeError(f"{key.name}: not a block of keys: {node.value}", where=where) from None


def _scalar(key: Key, node: yaml.ScalarNode, where: str, source: Source) -> Any:
    """One word or number, in the first of the key's types that it can be meant as."""
    types, raw = key.types, node.value
    try:
        plain = construct(node)
    except ValueError as error:
        raise RecipeError(f"{key.name}: {error}", where=where, help="write the value without a !tag") from None
    if plain is None:
        if "none" in types:
            return None
        raise RecipeError(
            f"{key.name} cannot be null", where=where, help=f"remove it: the default is {_written(key.default)}"
        )
    if isinstance(plain, bool):
        return _switch(key, plain, raw, where)
    if isinstance(plain, str):
        return _text(key, plain, node, where, source)
    if isinstance(plain, (int, float)) and {"int", "float"} & {*types}:
        if math.isfinite(plain) and not NUMBER.fullmatch(raw):
            raise RecipeError(
                f"{key.name}: YAML reads {raw} as {plain}",
                where=where,
                why="digits after a leading 0 are octal to it, and parts between colons are minutes and seconds",
                help="write a plain decimal number",
            )
        return _number(key, plain, raw, where)
    if "str" in types and not key.choices:  # `run_name: 2024`, a revision of digits, a date
        return raw
    if "list" in types:
        return [_scalar(replace(key, types=key.items or ANYTHING), node, where, source)]
    raise _wrong_type(key, f"{TYPE_NAMES.get(type(plain).__name__, type(plain).__name__)} ({raw})", where)


def _switch(key: Key, plain: bool, raw: str, where: str) -> Any:
    if "bool" in key.types:
        return plain
    if raw.lower() in key.choices:  # `eval_strategy: no`: YAML reads a boolean where the word was meant
        return raw.lower()
    if {"str", "list"} & {*key.types}:
        allowed = f"; allowed: {', '.join(key.choices)}" if key.choices else ""
        raise RecipeError(
            f"{key.name}: YAML reads {raw} as {str(plain).lower()}, and this key takes text",
            where=where,
            help=f'put it in quotes: {key.name}: "{raw}"{allowed}',
        )
    raise _wrong_type(key, f"true or false ({raw})", where)


def _text(key: Key, plain: str, node: yaml.ScalarNode, where: str, source: Source) -> Any:
    if HALF.search(plain):
        raise _half_character(key.name, where)
    types, text = key.types, plain.strip()
    if "str" in types and (not key.choices or plain in key.choices):
        if node.style is None and (cut := _cut_by_comment(node)):
            source.notes.append(f"{where}: {key.name}: YAML takes '{cut}' for a comment; quote the value if it is not")
        return plain
    if text.lower() in ("true", "false") and "bool" in types:
        return text.lower() == "true"
    if text.lower() in ("none", "null") and "none" in types:
        return None
    if {"int", "float"} & {*types} and NUMBER.fullmatch(text):
        number = float(text.replace("_", ""))
        if "e" in text.lower() and node.style is None and node.start_mark:
            source.notes.append(
                f"{where}: {key.name}: {text} is text to YAML 1.1 and was read as the number {number:g}"
            )
        return _number(key, number, text, where)
    if "list" in types:
        element = Key(key.name, key.owner, key.items or ANYTHING, None, choices=key.choices)
        return [_text(element, plain, node, where, source)]
    if "str" in types:
        return plain  # not among the choices, which the caller says
    raise _wrong_type(key, f"text ({plain})", where)


def _number(key: Key, plain: int | float, raw: str, where: str) -> int | float:
    if "float" in key.types and not (isinstance(plain, int) and "int" in key.types):
        try:
            return float(plain)
        except OverflowError:
            return float("inf")  # refused as every number that is not finite
    if isinstance(plain, int):
        return plain
    if plain.is_integer():
        return int(plain)
    raise _wrong_type(key, f"a number ({raw})", where)


def _cut_by_comment(node: yaml.ScalarNode) -> str:
    """What follows a plain value as a comment without a blank after its #, as in `run_name: try #3`."""
    mark = node.end_mark
    if mark is None or mark.buffer is None:
        return ""
    rest = mark.buffer[mark.pointer :].split("\n", 1)[0]
    found = re.match(r"[ \t]+(#[^\s#].*)", rest)
    return found[1].rstrip("\0\r ") if found else ""


def _half_character(name: str, where: str) -> RecipeError:
    why = "a lone surrogate, which no file and no tokenizer can hold"
    return RecipeError(f"{name} holds half a character", where=where, why=why, help="write the character itself")


def _wrong_type(key: Key, found: str, where: str) -> RecipeError:
    types = [t for t in key.types if t != "none" and not (t == "int" and "float" in key.types)]
    wanted = " or ".join(TYPE_NAMES[t] for t in types)
    if key.nested and "list" in key.types:
        example = f"\n  - {key.nested[0].name}: …"
    elif key.default is not None and not expected_range(key.name, key.default):  # a default may lie outside: OFT's r
        example = " " + _written(key.default)
    else:
        examples = {"int": "1", "float": "0.1", "bool": "true", "list": "[a, b]", "dict": "{name: value}"}
        example = " " + next((examples.get(t, "some text") for t in types), "")
    return RecipeError(
        f"{key.name} takes {wanted}, found {found}", where=where, help=f"for example {key.name}:{example}"
    )


def _written(default: Any) -> str:
    """A default as one writes it in YAML."""
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
