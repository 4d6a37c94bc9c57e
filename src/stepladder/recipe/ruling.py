"""What a rule is: how it is registered, and how it says that keys have no effect or contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stepladder.errors import RecipeError
from stepladder.recipe.recipe import Recipe


class RuleBreak(RecipeError):
    """A rule that the recipe breaks; `keys` are all that have a part in it."""

    def __init__(self, what: str, *, keys: Iterable[str], why: str = "", help: str = "", where: str = ""):
        self.keys = tuple(keys)
        super().__init__(what, why=why, help=help, where=where)


Rule = Callable[["Recipe"], "RuleBreak | None"]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Register a rule under its name; its docstring becomes the reason of its breaks."""
    why = " ".join((function.__doc__ or "").split()).removesuffix(".")
    if why[1:2].islower():  # not TRL
        why = why[0].lower() + why[1:]

    def named(recipe: Recipe) -> RuleBreak | None:
        found = function(recipe)
        return found and RuleBreak(found.what, keys=found.keys, why=why, help=found.help, where=found.where)

    RULES[function.__name__] = named
    return named


def idle(recipe: Recipe, because: str, keys: Iterable[str], help: str = "", harmless: bool = False) -> RuleBreak | None:
    """The break that some of `keys` are set although the value of the key `because` leaves them without effect.

    Args:
        because: the key that decides.
        harmless: recipes often carry these keys along, so they are left out with a note and are no break.
    """
    found = [key for key in keys if recipe.values.get(key) is not None]
    decided = recipe.layers.get(because, -1)
    left_out = [key for key in found if harmless or recipe.layers.get(key, 0) < decided]
    reason = shown(recipe, because) + (f" ({recipe.where(because)})" if because in recipe.values else " (the default)")
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
    """The break that `keys` contradict each other; it is reported where the last of them that is set stands."""
    place = at or next((key for key in reversed(keys) if key in recipe.values), keys[-1])
    return RuleBreak(what, keys=[*keys, *([at] if at else [])], help=help, where=recipe.where(place))


def shown(recipe: Recipe, key: str) -> str:
    """A key with its value, as one writes it."""
    value = recipe.get(key)
    if isinstance(value, (list, dict)):
        return key
    return f"{key}: {str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}"
