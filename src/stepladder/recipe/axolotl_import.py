"""Turn an Axolotl configuration into a recipe, and account for every key in it.

`read_config` → `translate`, by the rows of axolotl.yaml → `Translation` → `write_recipe`, `print_table`
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.padding import Padding
from rich.table import Table

from stepladder import installation
from stepladder.console import printable, quote_for_shell
from stepladder.errors import RecipeError, RecipeErrors
from stepladder.recipe import axolotl_rules, convert, load, rules  # noqa: F401 - registers its rules
from stepladder.recipe.axolotl_config import (
    DROPPED,
    EMPTY,
    TRANSLATED,
    UNSUPPORTED,
    Config,
    Outcome,
    apply_row,
    drop,
    refuse,
    rows,
    table,
)
from stepladder.recipe.schema import Key, known_keys
from stepladder.screen import Screen
from stepladder.suggest import suggest

YAML: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1000}
SECRET = re.compile(r"api_key|secret|password|(hf|hub)_token")
# A single data set is spelled flat, so that the command line can replace it.
FLAT = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
FLAT |= {"column_map": "column_map", "role_map": "role_map"}
EVALUATION = {"path": "eval_dataset_name", "split": "dataset_test_split"}
STYLES = {TRANSLATED: "green", DROPPED: "dim", UNSUPPORTED: "yellow"}
LEAST_NOTE = 40  # columns of a terminal that reasons need beside the other three


@dataclass
class Row:
    """One key of the configuration, or in parentheses one that is not set, and what becomes of it."""

    key: str
    value: Any
    outcome: Outcome
    where: str

    @property
    def implied(self) -> bool:
        """Not in the configuration: a default of Axolotl's that is another one here."""
        return self.key.startswith("(")

    @property
    def stops(self) -> bool:
        return self.outcome.kind == UNSUPPORTED and self.outcome.changes_training


@dataclass
class Translation:
    """`rows` account for every key of `source`; `recipe` holds the keys to write, `blocks` those of each data set."""

    source: Path
    rows: list[Row] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    strategy: str = ""

    def add(self, row: Row) -> None:
        """Add a row, and what it sets to the recipe: all of it, or nothing and the reason."""
        place = row.key.split(".")[0] if row.outcome.block else ""
        block = self.blocks.setdefault(place, {}) if place else {}
        inside = {key.name: key for key in known_keys()["datasets"].nested}
        try:
            recipe = self._check_values(row, row.outcome.recipe, known_keys(), self.recipe)
            entry = self._check_values(row, row.outcome.block, inside, block)
            if row.outcome.strategy and self.strategy not in ("", row.outcome.strategy):
                raise RecipeError(f"contradicts accelerate_configs/{self.strategy}.yaml: keep one")
        except RecipeError as error:
            if row.implied:
                return  # another key has said it
            faults = [fault.what for fault in getattr(error, "errors", [error])]
            row.outcome = refuse("; ".join(faults))
        else:
            self.recipe |= recipe
            block |= entry
            self.environment |= row.outcome.environment
            self.strategy = row.outcome.strategy or self.strategy
        self.rows.append(row)

    def _check_values(
        self, row: Row, keys: dict[str, Any], schema: dict[str, Key], target: dict[str, Any]
    ) -> dict[str, Any]:
        """The values in their keys' own types, joined with those that are there.

        Raises:
            RecipeError: no such key today, another type, not allowed, or another value is there already.
        """
        checked = {}
        for name, value in keys.items():
            if name not in schema:
                raise RecipeError(f"the installed TRL and Transformers have no {name}")
            nested = [key.name for key in schema[name].nested]
            if nested and not isinstance(value, dict):
                raise RecipeError(f"{name} takes a block of keys, found {shorten(value)}")
            if nested and (unknown := sorted(value.keys() - nested)):
                raise RecipeError(f"no {unknown[0]} in {name}; {suggest(unknown[0], nested)}".rstrip("; "))
            node = yaml.representer.SafeRepresenter().represent_data(value)
            new, old = convert.value(schema[name], node, row.where, convert.Source(row.where)), target.get(name)
            if isinstance(old, dict) and isinstance(new, dict):
                new = {**old, **new}
            elif isinstance(old, list) and name == "report_to":
                new = [*old, *(item for item in new if item not in old)]
            elif name in target and old != new:
                setter = next(r.key for r in self.rows if name in r.outcome.recipe or name in r.outcome.block)
                raise RecipeError(f"contradicts {setter}, from which {name}: {shorten(old)} follows: keep one")
            checked[name] = new
        return checked

    def finish(self) -> None:
        """Put the data sets into the recipe, and take out what the rules of recipes refuse.

        A key without effect was one for Axolotl too; any other that breaks a rule stops the import.
        """
        blocks = [block for block in self.blocks.values() if "path" in block]
        if len(blocks) == 1 and blocks[0].keys() <= FLAT.keys():
            self.recipe |= {FLAT[key]: value for key, value in blocks[0].items()}
        elif blocks:
            self.recipe["datasets"] = blocks
        while broken := self._find_breaks():
            for key, outcome in broken.items():
                del self.recipe[key]
                row = next(row for row in self.rows if key in row.outcome.recipe)
                rest = {name: value for name, value in row.outcome.recipe.items() if name != key}
                row.outcome = replace(row.outcome, recipe=rest) if rest else outcome

    def _find_breaks(self) -> dict[str, Outcome]:
        """The recipe keys that break a rule; one break at a time, since the next may be its consequence."""
        setters = {key: row for row in self.rows for key in row.outcome.recipe}
        layers = {key: 0 if key in setters and setters[key].implied else 1 for key in self.recipe}
        origins = {key: row.where for key, row in setters.items()}
        recipe = load.Recipe(self.source.stem, self.source, dict(self.recipe), origins, layers=layers)
        breaks = rules.check(recipe)
        if idle := setters.keys() & self.recipe.keys() - recipe.values.keys():  # defaults yield to what is set
            return {key: drop("it has no effect beside the other keys") for key in idle}
        for found in breaks:
            if keys := [key for key in found.keys if key in setters]:
                without_effect = "no effect" in found.what
                return {keys[-1]: drop(found.what) if without_effect else refuse(f"{found.what}: {found.why}")}
        return {}

    def target(self, row: Row) -> str:
        """What a key was translated to, in words of the recipe and of the launch command."""
        flat = "datasets" not in self.recipe
        block = {FLAT.get(key, key) if flat else key: value for key, value in row.outcome.block.items()}
        parts = [f"{key}: {shorten(value)}" for key, value in {**block, **row.outcome.recipe}.items()]
        parts += [f"{name}={value}" for name, value in row.outcome.environment.items()]
        if row.outcome.strategy:
            parts.append(f"accelerate_configs/{row.outcome.strategy}.yaml")
        return ", ".join(parts)

    def command(self, recipe: str) -> str:
        """The launch command for the recipe at this path."""
        variables = "".join(f"{name}={quote_for_shell(value)} " for name, value in self.environment.items())
        start = installation.launch_command(self.strategy, 2) if self.strategy else installation.command("sft")
        return f"{variables}{start} --recipe {quote_for_shell(recipe)}"

    def to_yaml(self, recipe: str) -> str:
        """The recipe's text: how to start it and what was left out, then the keys under their banners."""
        lines = [f"# From {self.source.name}, an Axolotl configuration.", f"#   {self.command(recipe)}"]
        if self.strategy:
            lines.append("# (--num_processes: as many as there are GPUs)")
        lines += [
            f"# Left out: {row.key}: {shorten(row.value)} ({row.outcome.reason})" for row in self.rows if row.stops
        ]
        lines = [printable(line).replace("\n", " ") for line in lines]  # a comment ends with its line
        banners = {name: tuple(starts.split()) for name, starts in table()["banners"].items()}
        banner_of = {
            key: next((name for name, starts in banners.items() if key.startswith(starts)), "training")
            for key in self.recipe
        }
        for banner in banners:
            if keys := {key: value for key, value in self.recipe.items() if banner_of[key] == banner}:
                lines += [f"\n# ---- {banner} ----", yaml.safe_dump(keys, **YAML).rstrip()]
        return "\n".join(lines) + "\n"


def shorten(value: Any, limit: int = 40) -> str:
    """A value in one line."""
    text = " ".join(yaml.safe_dump(value, default_flow_style=True, **YAML).removesuffix("\n...\n").split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- from a configuration to its translation ----


def translate(config: Config) -> Translation:
    """Account for every key of the configuration, and for the defaults of Axolotl's that are others here.

    Raises:
        RecipeError: a number or a list is needed for arithmetic, and is not one.
    """
    result = Translation(config.file)
    for key, value in config.values.items():
        for row in _account(key, value, _flatten_name(key), config):
            result.add(row)
    for default in table()["defaults"]:
        key = default["keys"]
        outcome = None if config.has(key) else apply_row(default, key, None, config)
        if outcome and (outcome.recipe or outcome.strategy or outcome.kind == UNSUPPORTED):
            result.add(Row(f"({key})", None, outcome, str(config.file)))
    result.finish()
    return result


def _flatten_name(key: str) -> str:
    """A key as the table has it: a dot in it leads nowhere."""
    return re.sub(r"[.\[\]*]", " ", key)


def _account(path: str, value: Any, name: str, config: Config) -> Iterator[Row]:
    """The row of one key, or those of the keys in its block; `name` is the path without list positions."""
    inside = f"{name}[]"
    if isinstance(value, dict) and value and _leads_on(f"{name}."):
        block = {str(key): item for key, item in value.items()}
        below = Config(block, config.places, config.file, config.root, f"{path}.")
        for key, item in block.items():
            plain = key.removeprefix("fsdp_") if name == "fsdp_config" else key
            yield from _account(f"{path}.{key}", item, f"{name}.{_flatten_name(plain)}", below)
    elif value and _leads_on(inside):
        items = config.entries(name) if _leads_on(f"{inside}.") else value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            yield from _account(f"{path}[{number}]", item, inside, config)
    else:
        shown = "…" if SECRET.search(name) else value
        yield Row(path, shown, _find_outcome(path, value, name, config), config.places.get(path, str(config.file)))


def _leads_on(start: str) -> bool:
    return any(known.startswith(start) for known in rows())


def _find_outcome(path: str, value: Any, name: str, config: Config) -> Outcome:
    start, _, last = name.rpartition(".")
    row = rows().get(name)
    if row is None and (families := [key for key in rows() if key.endswith("*") and name.startswith(key[:-1])]):
        row = rows()[max(families, key=len)]
    if row is None:
        if _leads_on(f"{name}.") or _leads_on(f"{name}["):
            return refuse("it takes a block of keys") if value else drop("empty")
        beside = [key.rpartition(".") for key in rows() if not key.endswith("*")]
        near = suggest(last, (key for block, _, key in beside if block == start))
        return refuse(f"no key that is known here; {near or 'a slip?'}")
    if value in EMPTY:
        return drop("empty")
    if re.match(r"test_datasets\[[1-9]", path):
        return refuse("a recipe evaluates on one set: the first", changes_training=False)
    outcome = apply_row(row, last, value, config)
    assert outcome, name  # the last case of each row applies always
    return _convert_to_evaluation(last, value, config, outcome) if name.startswith("test_datasets") else outcome


def _convert_to_evaluation(key: str, value: Any, entry: Config, outcome: Outcome) -> Outcome:
    """The same key in `test_datasets`: one file or hub data set, read as the first of `datasets` is."""
    if outcome.block.keys() <= EVALUATION.keys():
        recipe = {**outcome.recipe, **{EVALUATION[name]: item for name, item in outcome.block.items()}}
        return replace(outcome, block={}, recipe=recipe)
    if any(trained.get(key) == value for trained in entry.root.entries("datasets")[:1]):
        return drop("as in datasets")
    return refuse("the evaluation set is read as the first of datasets is", changes_training=False)


# ---- what is written ----


def check_output(config: Path, output: Path, overwrite: bool) -> None:
    """Refuse to write over the configuration, or over a file that `overwrite` does not give up."""
    if output.is_dir():
        raise RecipeError(f"{output} is a folder", where=load.COMMAND_LINE, help=f"-o {output / 'recipe.yaml'}")
    if output.exists() and config.exists() and output.samefile(config):
        raise RecipeError(f"{output} is the configuration itself", where=load.COMMAND_LINE, help="another -o")
    if output.exists() and not overwrite:
        raise RecipeError(f"{output} exists", where=load.COMMAND_LINE, help="another -o, or --overwrite")


def write_recipe(translation: Translation, output: Path) -> None:
    """Write the recipe, once it is proved to load; else leave nothing.

    Raises:
        RecipeError: it cannot be written, or does not load.
    """
    draft = output.with_name(f".{output.name}.draft")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(translation.to_yaml(str(output)), encoding="utf-8")
        load.load(str(draft), [])
        draft.replace(output)
    except OSError as error:
        raise RecipeError(f"{output} cannot be written: {error.strerror}", where=load.COMMAND_LINE) from None
    except RecipeError as error:
        faults = getattr(error, "errors", [error])
        source = str(translation.source)
        raise RecipeErrors([RecipeError(f.what, where=source, why=f.why, help=f.help) for f in faults]) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def as_json(translation: Translation, recipe: Path | None) -> dict[str, object]:
    return {
        "config": str(translation.source),
        "recipe": str(recipe) if recipe else None,
        "command": translation.command(str(recipe)) if recipe else None,
        "keys": [
            {
                "key": row.key,
                "value": row.value,
                "outcome": row.outcome.kind,
                "to": translation.target(row),
                "reason": row.outcome.reason,
                "changes_training": row.stops,
                "where": row.where,
            }
            for row in translation.rows
        ],
    }


def print_table(translation: Translation) -> None:
    """Colours and columns for a person's terminal, or two lines per key where columns would be cut; aligned lines, each
    whole, for a file or a pipe."""
    lines = []
    for row in translation.rows:
        kind = f"✘ {row.outcome.kind}" if row.stops else row.outcome.kind
        value = "(not set)" if row.implied else shorten(row.value)
        target = translation.target(row)
        note = "; ".join(part for part in (target and f"→ {target}", row.outcome.reason) if part)
        lines.append((row.key, value, kind, note))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    if not sys.stdout.isatty():
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)) + "  " + line[3])
        return
    screen = Screen()
    styles = ["bold red" if row.stops else STYLES[row.outcome.kind] for row in translation.rows]
    if sum(widths) + LEAST_NOTE <= screen.width:
        columns = Table("Axolotl's key", "value", "outcome", "in the recipe, or why", box=None, header_style="bold")
        for style, line in zip(styles, lines, strict=True):
            columns.add_row(*line, style=style)
        screen.print(columns)
        return
    screen.print("Axolotl's key: its value\n  outcome: in the recipe, or why", style="bold")
    for style, (key, value, kind, note) in zip(styles, lines, strict=True):
        screen.print(f"{key}: {value}", style=style)
        screen.print(Padding(f"{kind}: {note}" if note else kind, (0, 0, 0, 2)), style=style)
