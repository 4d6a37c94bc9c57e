"""How a rule finds that a recipe's keys have no effect or contradict each other, and the table of rules, rules.yaml."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stepladder import files
from stepladder.errors import RecipeError
from stepladder.recipe.recipe import Recipe

TABLE = files.read_table("recipe/rules.yaml")
Check = Callable[[Recipe], "RuleBreak | None"]


class RuleBreak(RecipeError):
    """A rule that the recipe breaks; `keys` are all that have a part in it."""

    def __init__(self, what: str, *, keys: Iterable[str], why: str = "", help: str = "", where: str = ""):
        self.keys = tuple(keys)
        super().__init__(what, why=why, help=help, where=where)


@dataclass(frozen=True)
class Rule:
    """A check of a recipe, and the reason that a person reads where the recipe breaks it."""

    why: str
    check: Check

    def broken_by(self, recipe: Recipe) -> RuleBreak | None:
        found = self.check(recipe)
        return found and RuleBreak(
            found.what, keys=found.keys, why=found.why or self.why, help=found.help, where=found.where
        )


def build_rules(checks: dict[str, Check]) -> dict[str, Rule]:
    """The rules by name, in the table's order. A rule without a row is a function, whose docstring is the reason."""
    rules = {}
    for name, row in TABLE["rules"].items():
        if row:
            rules[name] = Rule(row["why"], _check_by_row(row))
        else:
            why = " ".join((checks[name].__doc__ or "").split()).removesuffix(".")
            if why[1:2].islower():  # not TRL
                why = why[0].lower() + why[1:]
            rules[name] = Rule(why, checks[name])
    return rules


def _check_by_row(row: dict[str, Any]) -> Check:
    def check(recipe: Recipe) -> RuleBreak | None:
        for case in row.get("cases", [row]):
            when, unless = case.get("when", {}), case.get("unless", {})
            if not all(_matches(recipe, *item) for item in when.items()):
                continue
            if any(_matches(recipe, *item) for item in unless.items()):
                continue
            if "what" in case:
                keys = [name.partition(".")[0] for name in (*unless, *when)]
                what = case["what"].format_map({key: format_key(recipe, key) for key in keys})
                return conflict(recipe, what, keys, case["help"], case.get("at", ""))
            if found := idle(recipe, next(iter(when or unless)), _idle_keys(recipe, case), case.get("help", "")):
                return found
        return None

    return check


def _idle_keys(recipe: Recipe, case: dict[str, Any]) -> Iterator[str]:
    for pattern in case["keys"]:
        yield from [pattern] if pattern.isidentifier() else filter(re.compile(pattern).fullmatch, recipe.values)


def _matches(recipe: Recipe, name: str, pattern: Any) -> bool:
    """Whether the value of a key, or of `block.key`, or an item of it, is as the regular expression says."""
    key, *inner = name.split(".")
    value = recipe.get(key)
    for part in inner:
        value = (value or {}).get(part)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return any(re.fullmatch(_format(pattern), _format(item), re.DOTALL) for item in items)


def idle(recipe: Recipe, because: str, keys: Iterable[str], help: str = "", harmless: bool = False) -> RuleBreak | None:
    """The break that some of `keys` are set although the value of the key `because` leaves them without effect.

    Where a later layer than theirs set `because`, they are left out with a note instead.

    Args:
        because: the key that decides.
        harmless: recipes often carry these keys along, so they are left out in any case.
    """
    found = [key for key in keys if recipe.values.get(key) is not None]
    decided = recipe.layers.get(because, -1)
    left_out = [key for key in found if harmless or recipe.layers.get(key, 0) < decided]
    place = recipe.where(because) if because in recipe.values else "the default"
    reason = f"{format_key(recipe, because)} ({place})"
    for key in left_out:
        recipe.notes.append(f"{recipe.where(key)}: {key} is left out: it has no effect with {reason}")
        recipe.replaced[key] = recipe.values.pop(key)
    found = [key for key in found if key not in left_out]
    if not found:
        return None
    names = f"{', '.join(found[:-1])} and {found[-1]}" if len(found) > 1 else found[0]
    what = f"{names} {'have' if len(found) > 1 else 'has'} no effect with {reason}"
    help = f"remove {'them' if len(found) > 1 else 'it'}" + (f", or {help}" if help else "")
    return RuleBreak(what, keys=[because, *found], help=help, where=recipe.where(found[0]))


def conflict(recipe: Recipe, what: str, keys: list[str], help: str, at: str = "") -> RuleBreak:
    """The break that `keys` contradict each other; it is reported at `at`, or at the last of them that is set."""
    place = at or next((key for key in reversed(keys) if key in recipe.values), keys[-1])
    return RuleBreak(what, keys=[*keys, *([at] if at else [])], help=help, where=recipe.where(place))


def format_key(recipe: Recipe, key: str) -> str:
    """`key: value` as a recipe has it; the key alone where the value is a list or a block."""
    value = recipe.get(key)
    return key if isinstance(value, (list, dict)) else f"{key}: {_format(value)}"


def _format(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
