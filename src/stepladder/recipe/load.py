"""From a YAML file and the command line to a recipe in which every key is known and well typed.

Nothing heavy is imported here: a wrong key is reported before torch is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe import convert
from stepladder.recipe.schema import Schema, known_keys

COMMAND_LINE = "command line"
# Keys that say where a run lies and how it is watched, not what it computes.
NOT_PART_OF_THE_RUN = {"output_dir", "run_name", "report_to", "disable_tqdm", "logging_dir", "log_level"}


@dataclass
class Recipe:
    """What was asked for: the keys that were set, each with its origin (`file:line:column`)."""

    name: str
    path: Path
    values: dict[str, Any]
    origins: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value set for `key`, or the library's default; a key that nobody knows is a programming error."""
        return self.values[key] if key in self.values else known_keys()[key].default

    def where(self, key: str) -> str:
        return self.origins.get(key, f"{self.path} (default)")

    @property
    def output_dir(self) -> Path:
        return Path(self.values.get("output_dir") or Path("runs") / self.name)

    def owned_by(self, owner: str) -> dict[str, Any]:
        """The keys set that belong to one of TRL's dataclasses, as its constructor takes them."""
        keys = known_keys()
        return {name: value for name, value in self.values.items() if keys[name].owner == owner}

    def hash(self) -> str:
        """The identity of what the recipe computes (SHA-256, 16 hexadecimal digits)."""
        content = {k: v for k, v in sorted(self.values.items()) if k not in NOT_PART_OF_THE_RUN}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)


def load(name: str | None, overrides: list[str]) -> Recipe:
    """Read a recipe by path or name, its parents first, then the command line's `--key value` pairs.

    Raises:
        RecipeErrors: with every fault of the file and of the command line.
    """
    if not name:
        raise RecipeError(
            "no recipe given",
            where=COMMAND_LINE,
            way_out=f"--recipe NAME, for example --recipe {' or '.join(_shipped()[:3]) or 'path/to/recipe.yaml'}",
        )
    path = find(name)
    recipe = Recipe(name=path.stem, path=path, values={}, origins={})
    errors: list[RecipeError] = []
    _read_file(path, recipe, errors, parents=())
    _read_command_line(overrides, recipe, errors)
    if errors:
        raise RecipeErrors(errors)
    recipe.values.pop("extends", None)  # resolved: what is left stands alone
    return recipe


def find(name: str) -> Path:
    """`name` as given, then under `recipes/`; `.yaml` may be left out."""
    if Path(name).is_dir() and (Path(name) / "recipe.yaml").is_file():
        return Path(name) / "recipe.yaml"  # a run folder: its own recipe
    for candidate in (name, f"{name}.yaml", f"recipes/{name}", f"recipes/{name}.yaml"):
        if Path(candidate).is_file():
            return Path(candidate)
    raise RecipeError(
        f"there is no recipe '{name}'",
        where=COMMAND_LINE,
        why="looked for as given and under recipes/, with and without .yaml",
        way_out=convert.suggest(name, _shipped()) or "run from the folder that holds recipes/, or give a path",
    )


def _shipped() -> list[str]:
    return sorted(str(p.relative_to("recipes").with_suffix("")) for p in Path("recipes").rglob("*.yaml"))


def _read_file(path: Path, recipe: Recipe, errors: list[RecipeError], parents: tuple[Path, ...]) -> None:
    """Add a file's keys to the recipe, those of the recipe that it `extends` first."""
    root = compose(path)
    pairs = convert.mapping(root, str(path), errors)
    if "extends" in pairs:
        key_node, value_node = pairs["extends"]
        parent = path.parent / str(value_node.value)
        if not parent.is_file() and parent.with_suffix(".yaml").is_file():
            parent = parent.with_suffix(".yaml")
        chain = (*parents, path.resolve())
        if not parent.is_file():
            errors.append(
                RecipeError(
                    f"extends '{value_node.value}', which does not exist",
                    where=convert.position(str(path), key_node),
                    why=f"looked for {parent}",
                    way_out="a path relative to this recipe",
                )
            )
        elif parent.resolve() in chain:
            names = " → ".join(p.name for p in (*chain, parent))
            errors.append(
                RecipeError(
                    f"recipes extend each other in a circle: {names}",
                    where=convert.position(str(path), key_node),
                    way_out="remove one of the `extends`",
                )
            )
        else:
            _read_file(parent, recipe, errors, chain)
    for name, (key_node, value_node) in pairs.items():
        where = convert.position(str(path), key_node)
        _set(recipe, name, value_node, where, str(path), errors)


def compose(path: Path) -> yaml.Node | None:
    """Parse YAML to nodes, which know their line and column.

    Raises:
        RecipeError: not readable, not UTF-8, or not YAML; tabs are named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path), way_out="a UTF-8 text file") from None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        if "'\\t'" in str(error.problem):
            raise RecipeError("a tab", where=where, why="YAML indents by spaces only", way_out="use spaces") from None
        raise RecipeError(
            f"invalid YAML: {error.problem}",
            where=where,
            why=str(error.context or ""),
            way_out="`key: value` lines; quote a value that holds ': ' or '#'",
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"invalid YAML: {error}", where=str(path)) from None


def _read_command_line(arguments: list[str], recipe: Recipe, errors: list[RecipeError]) -> None:
    """`--key value`, `--key=value`, `--flag`; several words for a list. Dashes count as underscores."""
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--"):
            errors.append(RecipeError(f"unexpected word '{word}'", where=COMMAND_LINE, way_out="--key value"))
            continue
        name, equals, text = word[2:].partition("=")
        words = [text] if equals else []
        if not equals:
            while position < len(arguments) and not arguments[position].startswith("--"):
                words.append(arguments[position])
                position += 1
        name = name.replace("-", "_")
        text = f"[{', '.join(words)}]" if len(words) > 1 else "".join(words) or "true"
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:  # a prompt with a colon, say: then the text is the value
            node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
        if name == "extends":
            errors.append(RecipeError("--extends works in a file only", where=COMMAND_LINE, way_out="use --recipe"))
            continue
        _set(recipe, name, node, f"{COMMAND_LINE} --{name}", COMMAND_LINE, errors)


def _set(recipe: Recipe, name: str, node: yaml.Node | None, where: str, file: str, errors: list[RecipeError]) -> None:
    keys: Schema = known_keys()
    if name not in keys:
        errors.append(convert.unknown_key(name, list(keys), where))
        return
    try:
        value = convert.value(keys[name], node, where, file, recipe.notes)
    except RecipeErrors as many:
        errors.extend(many.errors)
    except RecipeError as error:
        errors.append(error)
    else:
        recipe.values[name] = value
        recipe.origins[name] = where
