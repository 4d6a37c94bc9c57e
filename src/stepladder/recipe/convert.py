"""From a YAML node to a value of the type that a key takes, with YAML's traps named."""

from __future__ import annotations

import difflib
import re
from typing import Any

import yaml

from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe.schema import Key

NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?")
TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
TYPE_NAMES |= {"list": "a list", "dict": "a block of keys", "none": "null"}

Pairs = dict[str, tuple[yaml.Node, yaml.Node]]


def position(file: str, node: yaml.Node | None) -> str:
    """`file:line:column`, both counted from 1 as editors do."""
    mark = getattr(node, "start_mark", None)
    return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file


def suggest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def unknown_key(name: str, known: list[str], where: str) -> RecipeError:
    return RecipeError(
        f"unknown key '{name}'",
        where=where,
        why="neither Stepladder nor the installed TRL and Transformers know it, so it would change nothing",
        way_out=suggest(name, known) or "remove it",
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
        name = str(key_node.value)
        if name in pairs:
            first = pairs[name][0].start_mark.line + 1
            errors.append(
                RecipeError(
                    f"'{name}' stands twice, first on line {first}",
                    where=position(file, key_node),
                    why="YAML would silently keep the last one",
                    way_out="remove one",
                )
            )
            continue
        pairs[name] = (key_node, value_node)
    return pairs


def value(key: Key, node: yaml.Node | None, where: str, file: str, notes: list[str]) -> Any:
    """The value of `key` in its own type.

    Raises:
        RecipeError: of another type, or not among the allowed values.
        RecipeErrors: for the faults inside a nested block.
    """
    if key.nested:
        return _nested(key, node, where, file, notes)
    errors: list[RecipeError] = []
    _check_duplicates(node, file, errors)
    if errors:
        raise RecipeErrors(errors)
    plain = yaml.SafeLoader("").construct_object(node, deep=True) if node is not None else None
    raw = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
    result = _coerce(key, plain, raw, where, notes)
    if key.choices and isinstance(result, str) and result not in key.choices:
        raise RecipeError(
            f"{key.name}: '{result}' is not an allowed value",
            where=where,
            why=f"allowed: {', '.join(key.choices)}" if len(key.choices) <= 12 else "",
            way_out=suggest(result, list(key.choices)),
        )
    return result


def _coerce(key: Key, plain: Any, raw: str, where: str, notes: list[str]) -> Any:
    types = key.types
    kind = "none" if plain is None else type(plain).__name__
    if isinstance(plain, bool) and "bool" not in types and "str" in types:
        # `eval_strategy: no`: YAML reads a boolean where the word was meant.
        if raw.lower() in key.choices:
            return raw.lower()
        raise RecipeError(
            f"{key.name}: YAML reads {raw} as {str(plain).lower()}, and this key takes text",
            where=where,
            way_out=f'put it in quotes: {key.name}: "{raw}"'
            + (f"; allowed: {', '.join(key.choices)}" * bool(key.choices)),
        )
    if kind in types:
        return plain
    if kind == "int" and "float" in types:
        return float(plain)
    if kind == "str":
        text = plain.strip()
        if text.lower() in ("true", "false") and "bool" in types:
            return text.lower() == "true"
        if text.lower() in ("none", "null") and "none" in types:
            return None
        if NUMBER.fullmatch(text) and ("float" in types or "int" in types):
            number = float(text.replace("_", ""))
            if "float" in types:
                if "e" in text.lower():
                    notes.append(
                        f"{where}: {key.name}: {text} is text to YAML 1.1 and was read as the number {number:g}"
                    )
                return number
            if number.is_integer():
                return int(number)
        if "list" in types:
            return [plain]
    if kind == "float" and "int" in types and plain.is_integer():
        return int(plain)
    if kind in ("int", "float") and "str" in types and not key.choices:
        return raw or str(plain)
    wanted = " or ".join(TYPE_NAMES[t] for t in types if t != "none") or "nothing"
    found = {"none": "nothing"}.get(kind) or f"{TYPE_NAMES.get(kind, kind)} ({raw or plain!r})"
    raise RecipeError(
        f"{key.name} takes {wanted}, found {found}",
        where=where,
        way_out=f"for example {key.name}: {_example(key)}",
    )


def _example(key: Key) -> str:
    if key.default is not None:
        return str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
    return {"int": "1", "float": "0.1", "bool": "true", "list": "[a, b]", "dict": "{name: value}"}.get(
        next((t for t in key.types if t != "none"), ""), "some text"
    )


def _nested(key: Key, node: yaml.Node | None, where: str, file: str, notes: list[str]) -> list[dict[str, Any]]:
    """A list of blocks whose keys are known: the entries of `datasets`."""
    if not isinstance(node, yaml.SequenceNode):
        raise RecipeError(f"{key.name} takes a list of blocks", where=where, way_out=f"{key.name}:\n  - path: …")
    known = {item.name: item for item in key.nested}
    errors: list[RecipeError] = []
    blocks = []
    for item in node.value:
        block: dict[str, Any] = {}
        for name, (key_node, value_node) in mapping(item, file, errors).items():
            at = position(file, key_node) if file != where else where
            if name not in known:
                errors.append(unknown_key(f"{key.name}: {name}", [f"{key.name}: {k}" for k in known], at))
                continue
            try:
                block[name] = value(known[name], value_node, at, file, notes)
            except RecipeError as error:
                errors.extend(getattr(error, "errors", [error]))
        blocks.append(block)
    if errors:
        raise RecipeErrors(errors)
    return blocks


def _check_duplicates(node: yaml.Node | None, file: str, errors: list[RecipeError]) -> None:
    if isinstance(node, yaml.MappingNode):
        for _, value_node in mapping(node, file, errors).values():
            _check_duplicates(value_node, file, errors)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_duplicates(item, file, errors)
