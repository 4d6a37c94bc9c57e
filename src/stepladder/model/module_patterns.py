"""Regular expressions over module names, a recipe's or an adapter's: whether each can be matched in time.

PEFT and Transformers match them in this process, against the name of each module. One such as `(.+)+x` takes
time that doubles with each character of a name. The expression alone does not tell, so each is matched once under a
limit of time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder.data.templates.chat_template import LimitExceeded, limit_resources
from stepladder.errors import ModelError
from stepladder.model.start import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import PeftConfig

WHOLE = r"(?:{})\Z"
# How PEFT matches the expressions of a field (tuners_utils.py, utils/other.py); the first kind are texts, not lists.
FORMS = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), WHOLE),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), r"(.*\.)?({})$"),
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}


def check(config: PeftConfig, names: list[str], place: Callable[[str], tuple[str, str]]) -> None:
    """Raise ModelError for an expression of a configuration that is none, or that takes seconds to match.

    Args:
        names: of all modules of the model.
        place: what a person calls a field of the configuration, and where it is set.
    """
    for field, expression, form in _expressions(config):
        match_in_time(expression, names, *place(field), form)


def check_file(config: PeftConfig, names: list[str], folder: Path) -> None:
    """As `check`, for the configuration of the adapter in a folder."""
    file = str(folder / ADAPTER_CONFIG)
    check(config, names, lambda field: (field, file))


def match_in_time(expression: str, names: list[str], label: str, where: str, form: str = WHOLE) -> None:
    """Raise ModelError for a regular expression that is none, or that takes seconds to match against `names`."""
    what = f"{label}: '{expression[:60]}{'…' * (len(expression) > 60)}'"
    try:
        re.compile(expression)  # alone first, so that the message counts positions in it
        pattern = re.compile(form.replace("{}", expression))
    except (re.error, OverflowError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ModelError(f"{what} is no regular expression: {why}", where=where, help="names of modules") from None
    try:
        with limit_resources():
            for name in names:
                pattern.match(name)
    except LimitExceeded:
        raise ModelError(
            f"{what} takes seconds to match against the names of this model's modules",
            where=where,
            why="a repetition within another one, as in (a+)+, is tried in every way that it can divide a name",
            help=r"names of modules, or a plainer expression such as .*\.(q|v)_proj",
        ) from None


def _expressions(config: PeftConfig) -> Iterator[tuple[str, str, str]]:
    """Field, expression and how it is matched."""
    for field, form in FORMS.items():
        value = getattr(config, field, None)
        if isinstance(value, str) and value != "all-linear":
            yield field, value, form
        elif not field.endswith("_modules"):  # names in a list of those are compared as they are
            yield from ((field, each, form) for each in value or () if isinstance(each, str))
