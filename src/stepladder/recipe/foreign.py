"""Configuration files of other tools, recognized by their keys, with what a recipe says in their place.

foreign.yaml lists the tools and their keys. Nothing is translated without a person: the message is where to begin.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stepladder import files
from stepladder.errors import RecipeError
from stepladder.recipe import convert, rules
from stepladder.recipe.schema import known_keys

SCRIPTS = (".sh", ".bash", ".sbatch")
FLAG = re.compile(r"(?<!\S)--([\w.-]+)(?:[ =]+(?!--)('[^']*'|\"[^\"]*\"|[^\s\\]+))?")
NAMES_SHOWN = 12  # of the keys without a counterpart
Tool = dict[str, Any]


@functools.cache
def tools() -> dict[str, Tool]:
    """The tools by name, as foreign.yaml has them."""
    return files.read_table("recipe/foreign.yaml")


def refuse(node: yaml.Node | None, path: Path) -> None:
    """Raise RecipeError where the block in a file is the configuration of another tool."""
    if not isinstance(node, yaml.MappingNode):
        return
    values = dict(_leaves(node))
    names = dict.fromkeys([*(str(key.value) for key, _ in node.value), *values])  # a block's own name, too
    for name, tool in tools().items():
        alone = [key for key in names for mark in tool["alone"] if fnmatch.fnmatchcase(key, mark)]
        together = [key for key in tool.get("together", ()) if key in names]
        if alone or len(together) > 1:
            marks = list(dict.fromkeys([*alone, *together]))[:4]
            why = f"its key {marks[0]} says so" if len(marks) == 1 else f"its keys {', '.join(marks)} say so"
            raise _error(f"this is a configuration of {name}", why, name, values, path)


def refuse_script(text: str, path: Path) -> None:
    """Raise RecipeError where a file is a shell script: its flags are read as the keys of the tool that it starts."""
    if path.suffix not in SCRIPTS and not text.startswith("#!"):
        return
    for name, tool in tools().items():
        if found := re.search(tool.get("command", "$^"), text):
            flags = [(flag.replace("-", "_"), value.strip("'\"")) for flag, value in FLAG.findall(text)]
            values = {flag: yaml.safe_load(value) if _is_plain(value) else value or True for flag, value in flags}
            raise _error(f"this is a shell script that starts {name}", f"it runs '{found[0]}'", name, values, path)
    raise RecipeError("this is a shell script, and no recipe", where=str(path), help="--recipe FILE.yaml")


def _is_plain(value: str) -> bool:
    return bool(convert.NUMBER.fullmatch(value)) or value.lower() in ("true", "false")


def _leaves(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a block and of those inside it, by their dotted names."""
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _leaves(value_node, f"{name}.")
        else:
            try:
                yield name, convert.construct(value_node)
            except ValueError:
                yield name, None


def _error(what: str, why: str, name: str, values: dict[str, Any], path: Path) -> RecipeError:
    hint = tools()[name].get("hint")
    help = hint.format(file=path) if hint else _first_lines(name, values)
    return RecipeError(what, where=str(path), why=why, help=help)


def _first_lines(name: str, values: dict[str, Any]) -> str:
    """The lines that a recipe can begin with, each with the key that it stands for, and what has no counterpart."""
    lines: dict[str, str] = {}  # a key of the recipe is written once
    notes, others = [], []
    for key, value in values.items():
        line = None if value is None else _recipe_line(key, value, tools()[name]["keys"])
        if line is None:
            others += [key] if value is not None else []
        elif line.startswith("#"):
            notes.append(line)
        elif line:
            name_here = line.partition(":")[0]
            lines.setdefault(name_here, line if name_here == key else f"{line}  # {key}")
    more = f" and {len(others) - NAMES_SHOWN} more" if len(others) > NAMES_SHOWN else ""
    left = [f"# no counterpart is known for {', '.join(others[:NAMES_SHOWN])}{more}"] if others else []
    defaults = f"# a key that is not written has {name}'s default there, and TRL's here"
    return "\n".join(["write a recipe; it can begin with", *lines.values(), *notes, *left, defaults])


def _recipe_line(key: str, value: Any, table: dict[str, Any]) -> str | None:
    """The recipe's line for a key and its value, a comment, nothing to write (empty), or None: not known."""
    target = table.get(key, key)
    if isinstance(target, dict):
        word = str(value).lower()
        target = target.get(word, target.get("*"))
        if target and re.match(r"\w+: ", target):
            return target
    if not target:
        return target
    if " " in target:
        return f"# {key}: {target}"
    return _key_line(target, value)


def _key_line(key: str, value: Any) -> str | None:
    """`key: value`, where the recipe would take it."""
    if key not in known_keys() or key in rules.REFUSED:
        return None
    schema = known_keys()[key]
    if isinstance(value, str) and "," in value and "list" in schema.types:
        value = [part.strip() for part in value.split(",")]
    node = yaml.representer.SafeRepresenter().represent_data(value)
    try:
        value = convert.value(schema, node, "", convert.Source(""))
    except RecipeError:
        return None
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("\n...\n")
    return f"{key}: {text.strip()}"
