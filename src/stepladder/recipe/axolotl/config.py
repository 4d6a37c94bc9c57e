"""An Axolotl configuration: its values, and where each stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from stepladder.errors import RecipeError, RecipeErrors, nearest
from stepladder.recipe import convert, foreign, load

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

    def has(self, *keys: str) -> bool:
        return any(self.get(key) is not None for key in keys)

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

    def evaluates(self) -> bool:
        return self.number("val_set_size", 0) > 0 or self.has("test_datasets")


def read(path: Path) -> Config:
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
    _places(root, str(path), "", places, errors)
    if errors:
        raise RecipeErrors(errors)
    values = {}
    for key_node, value_node in root.value:
        try:
            values[str(key_node.value)] = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            what = f"{key_node.value}: {getattr(error, 'problem', error)}"
            raise RecipeError(what, where=convert.position(str(path), key_node)) from None
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


def _places(node: yaml.Node, file: str, prefix: str, places: dict[str, str], errors: list[RecipeError]) -> None:
    """Where each key stands, by its path (`datasets[0].type`); a key that stands twice is an error."""
    if isinstance(node, yaml.MappingNode):
        for name, (key_node, value_node) in convert.mapping(node, file, errors).items():
            places[prefix + name] = convert.position(file, key_node)
            _places(value_node, file, f"{prefix}{name}.", places, errors)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            places[f"{prefix[:-1]}[{number}]"] = convert.position(file, item)
            _places(item, file, f"{prefix[:-1]}[{number}].", places, errors)
