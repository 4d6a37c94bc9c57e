"""What an import makes: an account of every key, the recipe, and the command that starts it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from stepladder.console import printable, quoted
from stepladder.errors import RecipeError, suggest
from stepladder.recipe import convert, load, rules
from stepladder.recipe.axolotl import data
from stepladder.recipe.axolotl.outcome import UNSUPPORTED, Outcome, dropped, unsupported
from stepladder.recipe.schema import Key, known_keys

YAML: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1000}
# The recipe's banners, and how the keys under each begin; the rest is training.
SECTIONS = {
    "model": "model_ trust_ dtype attn_ eos_ pad_token",
    "data": "data eval_dataset test_split column_map role_map chat_ prompt_ max_length packing eval_packing pad_to "
    "train_on train_sampling",
    "method": "use_peft use_dora use_rslora use_liger lora_ load_in bnb_ use_bnb neftune",
    "training": "",
    "saving and monitoring": "output_dir eval_s save_ logging report_to run_name project trackio push_ hub_ "
    "load_best metric greater",
}


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
    """`rows` account for every key of `source`; `recipe` holds the keys to write."""

    source: Path
    rows: list[Row] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    strategy: str = ""

    def take(self, row: Row) -> None:
        """Add a row, and what it sets to the recipe: all of it, or nothing and the reason."""
        place = row.key.split(".")[0] if row.outcome.block else ""
        block = self.blocks.setdefault(place, {}) if place else {}
        inside = {key.name: key for key in known_keys()["datasets"].nested}
        try:
            recipe = self._checked(row, row.outcome.recipe, known_keys(), self.recipe)
            entry = self._checked(row, row.outcome.block, inside, block)
            if row.outcome.strategy and self.strategy not in ("", row.outcome.strategy):
                raise RecipeError(f"contradicts accelerate_configs/{self.strategy}.yaml: keep one")
        except RecipeError as error:
            if row.implied:
                return  # another key has said it
            faults = [fault.what for fault in getattr(error, "errors", [error])]
            row.outcome = unsupported("; ".join(faults))
        else:
            self.recipe |= recipe
            block |= entry
            self.environment |= row.outcome.environment
            self.strategy = row.outcome.strategy or self.strategy
        self.rows.append(row)

    def _checked(
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
                raise RecipeError(f"{name} takes a block of keys, found {short(value)}")
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
                raise RecipeError(f"contradicts {setter}, from which {name}: {short(old)} follows: keep one")
            checked[name] = new
        return checked

    def finish(self) -> None:
        """Put the data sets into the recipe, and take out what the rules of recipes refuse.

        A key without effect was one for Axolotl too; any other that breaks a rule stops the import.
        """
        self.recipe |= data.finish(list(self.blocks.values()))
        while refused := self._refused():
            for key, outcome in refused.items():
                del self.recipe[key]
                row = self._setter(key)
                rest = {name: value for name, value in row.outcome.recipe.items() if name != key}
                row.outcome = replace(row.outcome, recipe=rest) if rest else outcome

    def _setter(self, key: str) -> Row:
        return next(row for row in self.rows if key in row.outcome.recipe)

    def _refused(self) -> dict[str, Outcome]:
        """The recipe keys that break a rule; one break at a time, since the next may be its consequence."""
        setters = {key: row for row in self.rows for key in row.outcome.recipe}
        layers = {key: 0 if key in setters and setters[key].implied else 1 for key in self.recipe}
        origins = {key: row.where for key, row in setters.items()}
        recipe = load.Recipe(self.source.stem, self.source, dict(self.recipe), origins, layers=layers)
        broken = rules.check(recipe)
        if idle := setters.keys() & self.recipe.keys() - recipe.values.keys():  # defaults yield to what is set
            return {key: dropped("it has no effect beside the other keys") for key in idle}
        for found in broken:
            if told := [key for key in found.keys if key in setters]:
                without_effect = "no effect" in found.what
                return {told[-1]: dropped(found.what) if without_effect else unsupported(f"{found.what}: {found.why}")}
        return {}

    def target(self, row: Row) -> str:
        """What a key was translated to, in words of the recipe and of the launch command."""
        flat = "datasets" not in self.recipe
        block = {data.FLAT.get(key, key) if flat else key: value for key, value in row.outcome.block.items()}
        parts = [f"{key}: {short(value)}" for key, value in {**block, **row.outcome.recipe}.items()]
        parts += [f"{name}={value}" for name, value in row.outcome.environment.items()]
        if row.outcome.strategy:
            parts.append(f"accelerate_configs/{row.outcome.strategy}.yaml")
        return ", ".join(parts)

    def command(self, recipe: str) -> str:
        """The launch command for the recipe at this path."""
        variables = "".join(f"{name}={quoted(value)} " for name, value in self.environment.items())
        script = f"scripts/sft.py --recipe {quoted(recipe)}"
        if not self.strategy:
            return f"{variables}python {script}"
        config = f"accelerate_configs/{self.strategy}.yaml"
        return f"{variables}accelerate launch --config_file {config} --num_processes 2 {script}"

    def to_yaml(self, recipe: str) -> str:
        """The recipe's text: how to start it and what was left out, then the keys under their banners."""
        lines = [f"# From {self.source.name}, an Axolotl configuration.", f"#   {self.command(recipe)}"]
        if self.strategy:
            lines.append("# (--num_processes: as many as there are GPUs)")
        lines += [f"# Left out: {row.key}: {short(row.value)} ({row.outcome.reason})" for row in self.rows if row.stops]
        lines = [printable(line).replace("\n", " ") for line in lines]  # a comment ends with its line
        for section in SECTIONS:
            keys = {key: value for key, value in self.recipe.items() if _section(key) == section}
            if keys:
                lines += [f"\n# ---- {section} ----", yaml.safe_dump(keys, **YAML).rstrip()]
        return "\n".join(lines) + "\n"


def _section(key: str) -> str:
    return next((name for name, starts in SECTIONS.items() if key.startswith(tuple(starts.split()))), "training")


def short(value: Any, limit: int = 40) -> str:
    """A value in one line."""
    text = " ".join(yaml.safe_dump(value, default_flow_style=True, **YAML).removesuffix("\n...\n").split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
