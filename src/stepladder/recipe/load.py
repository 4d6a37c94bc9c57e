"""From a YAML file and the command line to a recipe in which every key is known, well typed, and of use.

Nothing heavy is imported here: a wrong key is reported before torch is.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from stepladder import files, installation
from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe import convert, foreign, legacy_keys, rules
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.schema import known_keys
from stepladder.suggest import nearest, suggest

COMMAND_LINE = "command line"


def load(name: str | None, overrides: list[str]) -> Recipe:
    """Read a recipe by path or name, its parents first, then the command line's `--key value` pairs.

    Raises:
        RecipeErrors: with every fault of the files and of the command line, and every rule broken.
    """
    if not name:
        raise RecipeError(
            "no recipe given",
            where=COMMAND_LINE,
            help=f"--recipe NAME, for example --recipe {' or '.join(known_recipes()[:3])}",
        )
    path = find(name)
    reading = _Reading(Recipe(name=path.stem, path=path, values={}, origins={}))
    reading.file(path)
    reading.command_line(overrides)
    recipe = reading.recipe
    recipe.values.pop("extends", None)  # resolved: what is left stands alone
    # What a rule says of a key that was written wrongly may be wrong too; so without the parent's keys.
    broken = [found for found in rules.check(recipe) if not reading.suspects & {"extends", *found.keys}]
    if errors := [*reading.errors, *broken]:
        raise RecipeErrors(_in_order(errors))
    return recipe


def _in_order(errors: list[RecipeError]) -> list[RecipeError]:
    """File by file as they were read, each from top to bottom; the command line last."""
    files: dict[str, int] = {}

    def place(error: RecipeError) -> tuple[bool, int, int, int]:
        file, _, column = error.where.rpartition(":")
        file, _, line = file.rpartition(":")
        if not (line.isdigit() and column.isdigit()):
            file, line, column = error.where, "0", "0"
        number = files.setdefault(file, len(files))
        return error.where.startswith(COMMAND_LINE), number, int(line), int(column)

    return sorted(errors, key=place)


def find(name: str) -> Path:
    """The file of a recipe that `--recipe` or `extends` names: a path, or a name under `recipes/`.

    `.yaml` may be left out. A run folder stands for the recipe in it.

    Raises:
        RecipeError: no file can have this name, or none has it.
    """
    if fault := files.name_fault(f"{name}.yaml"):
        raise RecipeError(f"'{name[:60]}…' names no file: {fault}", where=COMMAND_LINE)
    if os.path.isfile(f"{name}/recipe.yaml"):
        return Path(name) / "recipe.yaml"
    is_name = not (name.startswith(("/", "~")) or ".." in name.split("/"))
    names = [name, f"recipes/{name}"] if is_name else [name]
    for candidate in [f"{word}{suffix}" for word in names for suffix in ("", ".yaml")]:
        if (file := installation.locate(candidate)).is_file():
            return file
    if os.path.lexists(name):  # a folder, a pipe, a link to nothing
        compose(Path(name))
    raise RecipeError(
        f"there is no recipe '{name}'",
        where=COMMAND_LINE,
        why=f"as given and under recipes/, with and without .yaml: {installation.places('recipes')}"
        if is_name
        else installation.places(name),
        help=suggest(name, known_recipes()) or f"--recipe {' or '.join(known_recipes()[:3])}, or a path",
    )


def known_recipes() -> list[str]:
    """The names that a recipe can be given by, without its folder and suffix."""
    return installation.list_files("recipes", "*.yaml")


def compose(path: Path) -> yaml.Node | None:
    """Parse YAML (or JSON, which is YAML) to nodes, which know their line and column.

    Raises:
        RecipeError: not an ordinary file of UTF-8 text, larger than `files.YAML_BYTES`, a shell script, not YAML (tabs
            are named), or blocks that are nested too deeply or multiply.
    """
    try:
        text = files.read_text(path, files.YAML_BYTES)
    except ValueError as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path), help="a UTF-8 text file") from None
    foreign.refuse_script(text, path)
    try:
        return files.compose(text)
    except files.Excess as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise RecipeError(str(error.problem), where=where, help="write the keys out, without * and &") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        if "'\\t'" in str(error.problem):
            raise RecipeError("a tab", where=where, why="YAML indents by spaces only", help="use spaces") from None
        raise RecipeError(
            f"invalid YAML: {error.problem}",
            where=where,
            why=str(error.context or ""),
            help="`key: value` lines; quote a value that holds ': ' or ' #', or begins with one of {[*&!|>%@`",
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"invalid YAML: {error}", where=str(path)) from None


class _Reading:
    """A recipe while it is read, and what is wrong with it."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.errors: list[RecipeError] = []
        self.suspects: set[str] = set()  # keys that were written wrongly
        self._layer = 0

    def file(self, path: Path, parents: tuple[Path, ...] = ()) -> None:
        """Add a file's keys, those of the recipe that it `extends` first."""
        root = compose(path)
        foreign.refuse(root, path)
        pairs = convert.mapping(root, str(path), self.errors)
        if "extends" in pairs and (parent := self._parent(path, *pairs["extends"], parents)):
            self.file(parent, (*parents, path))
        source = convert.Source(str(path), self.recipe.notes, self.recipe.origins)
        for name, (key_node, value_node) in legacy_keys.translate(pairs, source, self.errors).items():
            self._set(name, value_node, source.where(key_node), source)
        self._layer += 1

    def _parent(self, path: Path, key: yaml.Node, value: yaml.Node, parents: tuple[Path, ...]) -> Path | None:
        where, name = convert.position(str(path), key), str(value.value)
        if not isinstance(value, yaml.ScalarNode) or name in ("", "null", "~"):
            return None  # reported as a value of the wrong type, or meant as none
        self.suspects.add("extends")  # until it is found
        beside = _beside(path, name)
        try:
            parent = find(name)
        except RecipeError as error:
            help = error.help.removeprefix("--recipe ")
            if beside:
                help = f"extends: {_spelling(beside)} (a path counts from the folder that the command runs in)"
            self.errors.append(RecipeError(f"extends: {error.what}", where=where, why=error.why, help=help))
            return None
        if beside and not beside.samefile(parent) and not beside.samefile(path) and not _recipe_name(path):
            self.recipe.notes.append(f"{where}: extends is {parent}, and not {beside}, which lies beside the recipe")
        chain = [p.resolve() for p in (*parents, path)]
        if parent.resolve() in chain:
            shipped = installation.ROOT / "recipes" / f"{name.removesuffix('.yaml')}.yaml"  # under a name of the user's
            circle = [*(*parents, path)[chain.index(parent.resolve()) :], parent]
            self.errors.append(
                RecipeError(
                    f"recipes extend each other in a circle: {' → '.join(p.name for p in circle)}",
                    where=where,
                    help=f"extends: {shipped}" if shipped.is_file() else "remove one of the `extends`",
                )
            )
            return None
        self.suspects.discard("extends")
        return parent

    def command_line(self, arguments: list[str]) -> None:
        """`--key value`, `--key=value`, `--switch`; several words for a list. Dashes count as underscores."""
        position, seen = 0, set()
        while position < len(arguments):
            word, words = arguments[position], []
            position += 1
            if not word.startswith("--") or word == "--":
                self._wrong(f"unexpected word '{word}'", help="--key value; a text with blanks in quotes")
                continue
            flag, equals, text = word[2:].partition("=")
            name = flag.replace("-", "_")
            while not equals and position < len(arguments) and not arguments[position].startswith("--"):
                words.append(arguments[position])
                position += 1
            if fault := _fault(name, [text] if equals else words):
                self._wrong(f"--{name} {fault[0]}", help=fault[1])
                continue
            source = convert.Source(f"{COMMAND_LINE} --{name}", self.recipe.notes, self.recipe.origins)
            key_node = yaml.ScalarNode("tag:yaml.org,2002:str", name)
            value_node = _node(name, [text] if equals else words)
            for key, (_, node) in legacy_keys.translate({name: (key_node, value_node)}, source, self.errors).items():
                if key == "extends":
                    self._wrong("--extends works in a file only", help="use --recipe")
                elif key in seen:
                    self._wrong(f"--{key} is given twice", help="remove one")
                else:
                    self._set(key, node, source.file, source)
                seen.add(key)

    def _wrong(self, what: str, help: str) -> None:
        self.errors.append(RecipeError(what, where=COMMAND_LINE, help=help))

    def _set(self, name: str, node: yaml.Node, where: str, source: convert.Source) -> None:
        keys, recipe = known_keys(), self.recipe
        if name not in keys:
            self.errors.append(convert.unknown_key(name, list(keys), where))
            self.suspects |= {*nearest(name, keys)}
            return
        for label in [label for label in recipe.origins if label.startswith((f"{name}.", f"{name}["))]:
            del recipe.origins[label]  # a block replaces the one before it as a whole
        try:
            value = convert.value(keys[name], node, where, source)
        except RecipeError as error:
            self.errors.extend(getattr(error, "errors", [error]))
            self.suspects.add(name)
        else:
            if name in recipe.values and recipe.layers[name] < self._layer:
                recipe.replaced[name] = recipe.values[name]
            recipe.values[name], recipe.origins[name], recipe.layers[name] = value, where, self._layer


def _beside(recipe: Path, name: str) -> Path | None:
    """The file that `extends` would name if it counted from the recipe's own folder."""
    places = [recipe.parent / f"{name}{suffix}" for suffix in ("", ".yaml")]
    return next((file for file in places if file.is_file()), None)


def _spelling(file: Path) -> str:
    """How `extends` names a file here: a name under recipes/ where it has one, else its path."""
    here = os.path.relpath(file) if file.resolve().is_relative_to(Path.cwd()) else str(file.resolve())
    return _recipe_name(file) or here


def _recipe_name(file: Path) -> str:
    """A recipe's name under recipes/; empty where it lies elsewhere."""
    for recipes in (Path("recipes").resolve(), (installation.ROOT / "recipes").resolve()):
        if file.resolve().is_relative_to(recipes):
            return str(file.resolve().relative_to(recipes).with_suffix(""))
    return ""


def _fault(name: str, words: list[str]) -> tuple[str, str] | None:
    """What is wrong with the number of words after a flag, and what helps."""
    name = legacy_keys.table()["renamed"].get(name, name)
    types = known_keys()[name].types if name in known_keys() else ("bool", "list")
    if not words and "bool" not in types:
        return "has no value", f"--{name} VALUE"
    if len(words) > 1 and "list" not in types:
        return f"takes one value, found {len(words)}", "a text with blanks in quotes"
    return None


def _node(name: str, words: list[str]) -> yaml.Node:
    """The words after a flag as YAML would hold them, without its traps: the shell has parsed them already."""
    key = known_keys().get(legacy_keys.table()["renamed"].get(name, name))
    if len(words) > 1:
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_node(name, [word]) for word in words])
    if not words:  # a switch
        return yaml.ScalarNode("tag:yaml.org,2002:bool", "true")
    text = words[0]
    if text.startswith(("{", "[")) and (key is None or {"list", "dict"} & {*key.types}):
        try:
            return convert.drop_positions(files.compose(text))
        except yaml.YAMLError:
            pass
    takes_text = key is not None and {"str", "list"} & {*key.types} and not {"bool", "int", "float"} & {*key.types}
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    if takes_text and not (text and tag == "tag:yaml.org,2002:null"):
        tag = "tag:yaml.org,2002:str"
    return yaml.ScalarNode(tag, text, style=None if text else "'")
