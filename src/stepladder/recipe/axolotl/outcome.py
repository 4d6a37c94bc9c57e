"""How a key of an Axolotl configuration is accounted for: the three outcomes, and the usual rules that give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stepladder.recipe.axolotl.config import Config

TRANSLATED, DROPPED, UNSUPPORTED = "translated", "default, dropped", "not supported"


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


def sets(reason: str = "", **recipe: Any) -> Outcome:
    """Translated to these recipe keys."""
    return Outcome(TRANSLATED, reason, recipe)


def in_block(reason: str = "", **block: Any) -> Outcome:
    """Translated to these keys of its data set's block."""
    return Outcome(TRANSLATED, reason, block=block)


def dropped(reason: str) -> Outcome:
    return Outcome(DROPPED, reason)


def left_out(reason: str) -> Outcome:
    """Not supported, and the loss curve is the same without it."""
    return Outcome(UNSUPPORTED, reason)


def unsupported(reason: str) -> Outcome:
    """Not supported, and training would be another one without it."""
    return Outcome(UNSUPPORTED, reason, changes_training=True)


Rule = Callable[[Any, Config], Outcome]


def each(names: str, rule: Rule) -> dict[str, Rule]:
    """One rule for several keys."""
    return dict.fromkeys(names.split(), rule)


# ---- the usual rules; each makes one for the tables ----


def same(name: str, reason: str = "") -> Rule:
    """The same value under the recipe's name for it."""
    return lambda value, config: sets(reason, **{name: value})


def drop(reason: str) -> Rule:
    """Whatever its value, it has no effect here, or what it asks for happens anyway."""
    return lambda value, config: dropped(reason)


def usual(*values: Any, why: str, changes: bool = True) -> Rule:
    """What these values, or switching it off, ask for happens anyway; other values are not supported."""

    def rule(value: Any, config: Config) -> Outcome:
        if value in values or not value:
            return dropped("as here" if value else "off")
        return unsupported(why) if changes else left_out(why)

    return rule


def only(*values: Any, why: str) -> Rule:
    """What these values ask for happens anyway; any other, `false` too, is not supported."""
    return lambda value, config: dropped("as here") if value in values else unsupported(why)


def harmless(why: str) -> Rule:
    """Not supported, and the loss curve is the same without it."""
    return usual(why=why, changes=False)


def refused(why: str) -> Rule:
    """Not supported whatever its value, and training would be another one without it."""
    return lambda value, config: unsupported(why)


def only_with(condition: Callable[[Config], Any], reason: str, rule: Rule) -> Rule:
    """`rule` where the condition holds; elsewhere Axolotl ignores the key too."""
    return lambda value, config: rule(value, config) if condition(config) else dropped(reason)


def switch(name: str, to: Any = True) -> Rule:
    """True sets the recipe key `name` to `to`; false is the default."""
    return lambda value, config: sets(**{name: to}) if value else dropped("off")


def variable(name: str) -> Rule:
    """An environment variable of the launch command: the library reads it itself."""
    return lambda value, config: Outcome(
        TRANSLATED, "read from the environment", environment={name: str(value).lower() if value is True else str(value)}
    )
