"""Style rules of a house, in YAML: what share of a model's answers keeps each.

emojis:
  pattern: '[\U0001f300-\U0001faff]'
  at_least: 1
  at_most: 4
specific facts:
  pattern: '\\$?\\d+'
  in_reference: true   # a fact counts where the reference answer has it too
  facts: true          # this rule judges whether answers are true
  required: 0.95       # in fewer of the answers than that, the model is not recommended
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import files
from stepladder.errors import DataError, suggest


@dataclass(frozen=True)
class Rule:
    """A regular expression that an answer holds from `at_least` to `at_most` times.

    With `in_reference`, only what the reference holds too counts; where the reference holds none of
    it, the rule does not apply. `required` is the least share of answers (0 to 1) that must keep the rule;
    `facts` says that it judges whether answers are true, which needs such a share.
    """

    name: str
    pattern: re.Pattern[str]
    at_least: int = 1
    at_most: int | None = None
    in_reference: bool = False
    required: float | None = None
    facts: bool = False

    def kept(self, answer: str, reference: str) -> float | None:
        """1 or 0; None where the rule does not apply."""
        found = [match.group() for match in self.pattern.finditer(answer)]
        if self.in_reference:
            wanted = {match.group() for match in self.pattern.finditer(reference)}
            if not wanted:
                return None
            found = [text for text in set(found) if text in wanted]
        return float(self.at_least <= len(found) and (self.at_most is None or len(found) <= self.at_most))


def read(path: Path) -> list[Rule]:
    """The rules of a file, in their order.

    Raises:
        DataError: no such file, no YAML, an unknown key, a pattern that is none.
    """
    try:
        found = files.parse_yaml(files.read_text(path, files.YAML_BYTES))
    except ValueError as error:
        help = "see data/techco_rubric.yaml"
        raise DataError(f"the rubric {path} cannot be read", why=str(error), help=help) from None
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no rules", help="NAME: {pattern: '…'}, as in data/techco_rubric.yaml")
    return [_rule(str(name), keys, str(path)) for name, keys in found.items()]


def _rule(name: str, keys: Any, where: str) -> Rule:
    known = {field.name: field.type for field in dataclasses.fields(Rule)}
    if not isinstance(keys, dict) or not isinstance(keys.get("pattern"), str):
        raise DataError(f"the rule '{name}' has no pattern", where=where, help="pattern: 'a regular expression'")
    for key, value in keys.items():
        if key not in known or key == "name":
            raise DataError(f"unknown key '{key}' in the rule '{name}'", where=where, help=suggest(key, known))
        if key in ("at_least", "at_most") and (type(value) is not int or value < 0):
            raise DataError(f"{key} of the rule '{name}' is {value!r}", where=where, help="a number of matches")
        if key in ("in_reference", "facts") and type(value) is not bool:
            raise DataError(f"{key} of the rule '{name}' is {value!r}", where=where, help="true or false")
        if key == "required" and (type(value) not in (int, float) or not 0 < value <= 1):
            help = "a share of the answers above 0 and up to 1, such as 0.95"
            raise DataError(f"required of the rule '{name}' is {value!r}", where=where, help=help)
    if keys.get("facts") and not keys.get("required"):
        why = "a model that gets few facts right would be recommended all the same"
        raise DataError(f"the rule '{name}' judges facts and requires none", where=where, why=why,
                        help="required: 0.95")  # fmt: skip
    try:
        return Rule(name, **{**keys, "pattern": re.compile(keys["pattern"])})
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"the pattern of the rule '{name}' is none: {error}", where=where) from None
