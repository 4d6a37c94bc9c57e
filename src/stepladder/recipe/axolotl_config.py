"""An Axolotl configuration: its values, where each stands, and the table of what becomes of each key.

The rows of axolotl.yaml are read here; what they cannot say is code in axolotl_rules.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stepladder import files
from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe import convert, foreign, load
from stepladder.recipe.legacy_keys import is_one_of
from stepladder.recipe.schema import known_keys
from stepladder.suggest import nearest, suggest

TRANSLATED, DROPPED, UNSUPPORTED = "translated", "default, dropped", "not supported"
EMPTY: tuple[Any, ...] = (None, "", {})  # what Axolotl takes for a key that is not set


class Config:
    """The values of an Axolotl configuration, or of one data set in it (then `root` is the whole)."""

    def __init__(
        self, values: dict[str, Any], places: dict[str, str], file: Path, root: Config | None = None, prefix: str = ""
    ):
        self.values, self.places, self.file, self.prefix = values, places, file, prefix
        self.root = root or self

    def where(self, key: str) -> str:
        return self.places.get(self.prefix + key, str(self.file))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; an empty one counts as not set, as it does for Axolotl."""
        value = self.values.get(key)
        return default if value in EMPTY else value

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def block(self, key: str) -> dict[str, Any]:
        """The block at `key`, or none."""
        value = self.get(key)
        return value if isinstance(value, dict) else {}

    def number(self, key: str, default: float) -> float:
        """The number at `key`; `2e-4` is text to YAML 1.1 and a number to Axolotl.

        Raises:
            RecipeError: it is something else.
        """
        value = self.get(key, default)
        if isinstance(value, str) and convert.NUMBER.fullmatch(value.strip()):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(f"{key} takes a number, found {value!r}", where=self.where(key))
        return value

    def entries(self, key: str) -> list[dict[str, Any]]:
        """The data sets under `key`: Axolotl takes a list of blocks.

        Raises:
            RecipeError: it is something else.
        """
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise RecipeError(
                f"{key} takes a list of blocks",
                where=self.where(key),
                help=f"{key}:\n  - path: …\n    type: …",
            )
        return value


def read_config(path: Path) -> Config:
    """The configuration in a file.

    Raises:
        RecipeError: missing, not YAML, or no Axolotl configuration; those of other tools are named.
        RecipeErrors: keys that stand twice.
    """
    if not path.is_file():
        raise RecipeError(f"there is no file {path}", where=load.COMMAND_LINE, help="an Axolotl configuration")
    root = load.compose(path)
    if not isinstance(root, yaml.MappingNode):
        what = "the file is empty" if root is None else "the file holds no block of `key: value` lines"
        raise RecipeError(what, where=str(path), help="an Axolotl configuration (base_model: …)")
    if "base_model" not in (key.value for key, _ in root.value):
        foreign.refuse(root, path)
    errors: list[RecipeError] = []
    places: dict[str, str] = {}
    _find_places(root, str(path), "", places, errors)
    if errors:
        raise RecipeErrors(errors)
    values = {}
    for key_node, value_node in root.value:
        try:
            values[str(key_node.value)] = convert.construct(value_node)
        except ValueError as error:
            raise RecipeError(f"{key_node.value}: {error}", where=convert.position(str(path), key_node)) from None
    config = Config(values, places, path)
    if not config.has("base_model"):
        near = nearest("base_model", values)
        raise RecipeError(
            "no Axolotl configuration: it has no base_model",
            where=str(path),
            why="a recipe for TRL or Stepladder needs no import" if config.has("model_name_or_path") else "",
            help=f"write base_model for {near[0]}" if near else "base_model: the model to train",
        )
    return config


def _find_places(node: yaml.Node, file: str, prefix: str, places: dict[str, str], errors: list[RecipeError]) -> None:
    """Where each key stands, by its path (`datasets[0].type`); a key that stands twice is an error."""
    if isinstance(node, yaml.MappingNode):
        for name, (key_node, value_node) in convert.mapping(node, file, errors).items():
            places[prefix + name] = convert.position(file, key_node)
            _find_places(value_node, file, f"{prefix}{name}.", places, errors)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            places[f"{prefix[:-1]}[{number}]"] = convert.position(file, item)
            _find_places(item, file, f"{prefix[:-1]}[{number}].", places, errors)


@dataclass(frozen=True)
class Outcome:
    """What becomes of one key.

    Args:
        kind: TRANSLATED, DROPPED (it has no effect, or asks for what happens anyway) or UNSUPPORTED.
        reason: why, for a person; may be empty where a translation speaks for itself.
        recipe: the recipe keys that it sets.
        block: the keys that it sets in its own data set's block.
        environment: variables that the launch command sets.
        strategy: the accelerate config that it asks for.
        changes_training: only of UNSUPPORTED: without it the loss curve is another one.
    """

    kind: str
    reason: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    strategy: str = ""
    changes_training: bool = False


def set_keys(reason: str = "", **recipe: Any) -> Outcome:
    return Outcome(TRANSLATED, reason, recipe)


def drop(reason: str) -> Outcome:
    return Outcome(DROPPED, reason)


def refuse(reason: str, changes_training: bool = True) -> Outcome:
    return Outcome(UNSUPPORTED, reason, changes_training=changes_training)


Rule = Callable[[Any, Config], Outcome]
RULES: dict[str, Rule] = {}  # the functions that a row names with `by`
CONDITIONS: dict[str, Callable[[Config], Any]] = {}  # what `when` and `needs` may name beside keys


def rule(function: Rule) -> Rule:
    """Register a function of a value and its configuration under its name."""
    return RULES.setdefault(function.__name__, function)


@functools.cache
def table() -> dict[str, Any]:
    """The sections of axolotl.yaml."""
    return files.read_table("recipe/axolotl.yaml")


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """The row of each key, by its path without list positions (`datasets[].type`)."""
    sections = ("model", "data", "method", "training", "evaluation_saving_monitoring")
    pairs = [(key, row) for section in sections for row in table()[section] for key in row["keys"].split()]
    found = {key: {**row, "to": key} if "same" in row else row for key, row in pairs}
    data_sets = {key: row for row in table()["data_sets"] for key in row["keys"].split()}
    return found | {f"{name}[].{key}": row for name in ("datasets", "test_datasets") for key, row in data_sets.items()}


def apply_row(row: dict[str, Any], key: str, value: Any, config: Config) -> Outcome | None:
    """The outcome of a key by its row; None if no case applies.

    Args:
        key: its name in its own block.
        value: None if the row is one of the defaults.

    Raises:
        RecipeError: a number is needed and the value is none.
    """
    if "needs" in row and not any(_look_up(name, config) for name in row["needs"].split()):
        return drop(row.get("otherwise", f"no {row['needs']}"))
    if row.get("number"):
        value = config.number(key, 0)
    for case in row.get("cases", [row]):
        others = case.get("when", {}).items()
        if ("is" not in case or _fits(case["is"], value, config)) and all(
            _fits(test, _look_up(name, config), config) for name, test in others
        ):
            return _find_outcome(case, value, config)
    return None


def _find_outcome(case: dict[str, Any], value: Any, config: Config) -> Outcome:
    if "by" in case:
        return RULES[case["by"]](value, config)
    if value is not None and not value and case.keys() & {"usual", "switch", "spare"}:
        return drop("off")
    if is_one_of(value, case.get("usual", []) + case.get("only", [])):
        return drop("as here")
    for kind, changes_training in (("stop", True), ("spare", False)):
        if kind in case:
            return refuse(case[kind].replace("$", str(value)), changes_training)
    if "drop" in case:
        return drop(case["drop"])
    if "choice" in case:
        name, choices = str(value).lower(), known_keys()[case["choice"]].choices
        if name not in choices:
            return refuse(suggest(name, choices) or case["otherwise"])
        return set_keys(**{case["choice"]: name})
    keys = {case["switch"]: True} if isinstance(case.get("switch"), str) else case.get("switch", case.get("to", {}))
    environment = _fill(case.get("env", {}), value, config)
    return Outcome(
        TRANSLATED,
        case.get("why", ""),
        recipe=_fill(keys, value, config),
        block=_fill(case.get("in_set", {}), value, config),
        environment={name: str(text).lower() if text is True else str(text) for name, text in environment.items()},
        strategy=case.get("launch", ""),
    )


def _fill(template: str | dict[str, Any], value: Any, config: Config) -> dict[str, Any]:
    """The keys of a template: `$` is the value, `$name` another key or a condition, left out where it is not set."""
    filled = {}
    for name, item in ({template: "$"} if isinstance(template, str) else template).items():
        if isinstance(item, dict):
            item = _fill(item, value, config)
        elif isinstance(item, str) and item.startswith("$"):
            item = _look_up(item[1:], config) if item[1:] else value
        if item is not None:
            filled[name] = item
    return filled


def _look_up(name: str, config: Config) -> Any:
    return CONDITIONS[name](config) if name in CONDITIONS else config.get(name)


def _fits(test: Any, value: Any, config: Config) -> bool:
    if isinstance(test, bool):
        return bool(value) is test
    if isinstance(test, list):
        return is_one_of(value, test)
    if isinstance(test, dict):
        limits = {"least": operator.ge, "most": operator.le, "below": operator.lt}
        return all(limits[name](value, limit) for name, limit in test.items())
    if test.startswith("$"):
        return value == config.get(test[1:])
    return bool(re.search(test, str(value)))
