"""The explanation of a recipe: where each value comes from, and what each key does.

The explanations lie in explanations.yaml; a key that has none there is explained by the
library's own help, and said to be. Axolotl's key names are explained too, each by itself or
by the key that means the same.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from stepladder import console, files
from stepladder.recipe import axolotl_config, convert, load, rules
from stepladder.recipe.schema import known_keys
from stepladder.screen import Screen
from stepladder.suggest import suggest

AXOLOTL = "axolotl"
DEFAULT, PARENT, RECIPE = "default", "parent", "recipe"
LIBRARIES = "TRL and Transformers"
WIDEST = 110  # columns: longer lines are hard to read
LONGEST = 240  # characters of a value in a table
# Where keys without an explanation of ours belong, by the dataclass that they come from.
GROUP_OF_OWNER = {"ModelConfig": "method", "ScriptArguments": "data", "DatasetMixtureConfig": "data"}


@dataclass(frozen=True)
class Explanation:
    """What a key does. `by` is whose words these are: ours, the libraries' own help, or nobody's (empty)."""

    what: str
    group: str = "training"
    usual: str = ""
    up: str = ""
    down: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    matters: bool = False
    by: str = "Stepladder"


@dataclass(frozen=True)
class Entry:
    """A key with its value, its `source` (default, parent, recipe, command line) and place, and what it does."""

    key: str
    value: Any
    source: str
    where: str
    explanation: Explanation


@functools.cache
def explanations() -> dict[str, dict[str, Explanation]]:
    """By group, then key. Axolotl's key names are a group of their own."""
    by_group: dict[str, dict[str, Explanation]] = {}
    known: dict[str, Explanation] = {}
    for group, entries in files.read_table("recipe/explanations.yaml").items():
        # A word in place of an explanation is the key above that means the same.
        by_group[group] = {
            name: known[said]
            if isinstance(said, str)
            else Explanation(group=group, **{**said, "usual": str(said.get("usual", ""))})
            for name, said in entries.items()
        }
        known |= by_group[group]
    return by_group


def groups() -> list[str]:
    """The recipes' banners, in their order."""
    return [group for group in explanations() if group != AXOLOTL]


def explanation(name: str) -> Explanation:
    """Ours, or else the library's own help. `datasets.path` is the key `path` of an entry of `datasets`."""
    for group in groups():
        if name in explanations()[group]:
            return explanations()[group][name]
    block, _, inner = name.partition(".")
    key = known_keys()[block]
    if inner:
        key = next(nested for nested in key.nested if nested.name == inner)
    allowed = f"One of {', '.join(key.choices)}." if key.choices else ""
    return Explanation(
        what=" ".join([*key.help.split(), allowed]).strip(),
        group=GROUP_OF_OWNER.get(key.owner, _group_by_name(name)),
        by=LIBRARIES if key.help else "",
    )


def _group_by_name(name: str) -> str:
    monitored = (
        *("eval", "save", "log", "hub", "push", "report", "run"),
        *("project", "trackio", "wandb", "include", "metric"),
    )
    return groups()[-1] if name.startswith(monitored) else "data" if name.startswith("dataset") else "training"


def of_recipe(recipe: load.Recipe) -> list[Entry]:
    """The keys that the recipe sets, group by group as its banners do, the keys inside `datasets` after it."""
    entries = []
    for name, value in recipe.values.items():
        entries.append(Entry(name, value, *_origin(recipe, name), explanation(name)))
        entries.extend(_nested(entries[-1], explanation))
    order = groups()
    return sorted(entries, key=lambda entry: order.index(entry.explanation.group))  # a stable sort: else as written


def defaults(recipe: load.Recipe) -> list[Entry]:
    """The keys that decide a training, are not set, and have an effect in this recipe."""
    entries = []
    for name in (name for group in groups() for name, said in explanations()[group].items() if said.matters):
        if name not in recipe.values and _has_effect(recipe, name):
            value = str(recipe.output_dir) if name == "output_dir" else known_keys()[name].default
            entries.append(Entry(name, value, DEFAULT, DEFAULT, explanation(name)))
    return entries


def _has_effect(recipe: load.Recipe, name: str) -> bool:
    """Whether the rules would let this recipe set the key."""
    if name == "gradient_accumulation_steps":  # its rule needs the number of ranks, known at launch
        return recipe.get("global_batch_size") is None
    default = known_keys()[name].default
    trial = dataclasses.replace(recipe, values={**recipe.values, name: "" if default is None else default}, notes=[])
    broken = rules.check(trial)  # takes out of the trial what it would forgive
    return name in trial.values and not any(name in found.keys for found in broken)


def is_axolotl(path: Path) -> bool:
    """Axolotl's own mark: `base_model`, which no recipe has."""
    return "base_model" in convert.mapping(load.compose(path), str(path), [])


def of_axolotl(path: Path) -> list[Entry]:
    """The keys that an Axolotl configuration sets, in its own order."""
    config = axolotl_config.read_config(path)
    entries = []
    for name, value in config.values.items():
        entries.append(Entry(name, value, RECIPE, config.where(name), _axolotl_explanation(name)))
        entries.extend(_nested(entries[-1], _axolotl_explanation))
    return entries


def _axolotl_explanation(name: str) -> Explanation:
    known = explanations()[AXOLOTL]
    if name in known:
        return known[name]
    names = {key.replace("[]", "") for key in axolotl_config.rows()}
    if name in names and name in known_keys():
        return explanation(name)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
        return Explanation(what="A key of Axolotl's that has no explanation here.", by="")
    near = suggest(name, known) or suggest(name, names)  # the common ones first
    return Explanation(what=f"No key of Axolotl's{'; ' + near if near else '.'} Axolotl drops it silently.", by="")


def _nested(entry: Entry, explain: Callable[[str], Explanation]) -> Iterator[Entry]:
    """The keys inside a list of blocks, each once, with the values of all blocks."""
    if not (isinstance(entry.value, list) and all(isinstance(block, dict) for block in entry.value)):
        return
    for name in dict.fromkeys(name for block in entry.value for name in block):
        values = [block[name] for block in entry.value if name in block]
        inner = f"{entry.key}.{name}"
        yield Entry(inner, values[0] if len(values) == 1 else values, entry.source, entry.where, explain(inner))


def _origin(recipe: load.Recipe, name: str) -> tuple[str, str]:
    """The source and the place of a key; the path of a parent recipe without the steps up and down that led to it."""
    where = recipe.where(name)
    if where.startswith(load.COMMAND_LINE):
        return load.COMMAND_LINE, load.COMMAND_LINE
    where = os.path.normpath(where)
    file = where.rsplit(":", 2)[0]
    return RECIPE if file == os.path.normpath(recipe.path) else PARENT, where


def write(*renderables: RenderableType) -> None:
    """Print in colour on a terminal; elsewhere plain text, wide and without blanks at the ends of lines."""
    screen = Screen(plain=WIDEST)
    screen.width = min(screen.width, WIDEST)
    with screen.capture() as captured:
        screen.print(*renderables, sep="\n")
    console.write_exactly("\n".join(line.rstrip() for line in captured.get().rstrip().split("\n")) + "\n")


class Table:
    """Key, value and origin under the recipes' banners; defaults after what is set, dimmed."""

    def __init__(self, entries: list[Entry], unset: list[Entry]):
        self.entries = [*entries, *unset]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        places = [origin(entry, options.max_width) for entry in self.entries]
        for group in groups():
            rows = [row for row in zip(self.entries, places, strict=True) if row[0].explanation.group == group]
            if not rows:
                continue
            grid = RichTable.grid(padding=(0, 2), expand=True)
            grid.add_column(width=max(len(entry.key) for entry in self.entries))
            grid.add_column(overflow="fold", ratio=1)
            grid.add_column(justify="right", width=max(map(len, places)))
            for entry, place in rows:
                style = "dim" if entry.source == DEFAULT else ""
                grid.add_row(Text(entry.key, style), Text(brief(entry.value), style), Text(place, "dim"))
            yield _banner(group)
            yield grid


class Lesson:
    """A paragraph a key: what it does, the usual range, and what changes when it goes up or down."""

    def __init__(self, entries: list[Entry], banners: bool = True):
        self.entries, self.banners = entries, banners

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        group = ""
        for entry in self.entries:
            if self.banners and entry.explanation.group != group:
                group = entry.explanation.group
                yield _banner(group)
                yield ""
            head = RichTable.grid(expand=True, padding=(0, 2))
            head.add_column(overflow="fold", ratio=1)
            head.add_column(justify="right", no_wrap=True)
            title = Text.assemble((entry.key, "bold cyan"), f": {brief(entry.value)}")
            head.add_row(title, Text(origin(entry, options.max_width), "dim"))
            yield head
            yield Padding(_paragraph(entry), (0, 0, 1, 2))


def _paragraph(entry: Entry) -> RenderableType:
    said = entry.explanation
    lines = RichTable.grid(padding=(0, 2))
    for choice, meaning in said.choices.items():
        chosen = choice == str(entry.value).lower()
        lines.add_row(Text(f"{'▸' if chosen else ' '} {choice}", "bold" if chosen else ""), Text(meaning))
    for label, text in (("usual", said.usual), ("higher", said.up), ("lower", said.down)):
        if text:
            lines.add_row(Text(label, "dim"), Text(text))
    what = Text(said.what or "The library that knows this key does not say.")
    credit = [Text(f"(the help text of {said.by})", "dim")] if said.by == LIBRARIES else []
    return Group(what, *credit, *([lines] if lines.rows else []))


def _banner(group: str) -> Text:
    return Text(f"---- {group} ----", "bold")


def brief(value: Any) -> str:
    """A value for a table: a text longer than LONGEST, such as a chat template, is cut and its length given."""
    text = format_value(value)
    if len(text) <= LONGEST:
        return text
    length = len(value) if isinstance(value, str) else len(text)
    return f"{text[:LONGEST]}… ({length:,} characters)"


def format_value(value: Any) -> str:
    """A value as one writes it in YAML, on one line."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e9 else str(value)
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=100_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def origin(entry: Entry, width: int) -> str:
    """`default`, `command line`, `file:line`, or `parent file:line`; a long path loses its beginning."""
    if entry.source in (DEFAULT, load.COMMAND_LINE):
        return entry.source
    label = f"{PARENT} " if entry.source == PARENT else ""
    place, room = entry.where.rsplit(":", 1)[0], max(28, 2 * width // 5) - len(label)
    return label + (place if len(place) <= room else "…" + place[1 - room :])
