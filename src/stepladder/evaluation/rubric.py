"""Style rules of a house, in YAML: what share of a model's answers keeps each.

emojis:
  pattern: '[\U0001f300-\U0001faff]'
  at_least: 1
  at_most: 4
specific facts:
  pattern: '\\$?\\d+'
  in_reference: true   # a fact counts where the reference answer has it too
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import files
from stepladder.errors import DataError
from stepladder.suggest import suggest


@dataclass(frozen=True)
class Rule:
    """A regular expression that an answer holds from `at_least` to `at_most` times.

    With `in_reference`, only what the reference holds too counts; where the reference holds none of
    it, the rule does not apply.
    """

    name: str
    pattern: re.Pattern[str]
    at_least: int = 1
    at_most: int | None = None
    in_reference: bool = False

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
        way_out = "see data/techco_rubric.yaml"
        raise DataError(f"the rubric {path} cannot be read", why=str(error), way_out=way_out) from None
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no rules", way_out="NAME: {pattern: '…'}, as in data/techco_rubric.yaml")
    return [_rule(str(name), keys, str(path)) for name, keys in found.items()]


def _rule(name: str, keys: Any, where: str) -> Rule:
    known = {field.name: field.type for field in dataclasses.fields(Rule)}
    if not isinstance(keys, dict) or not isinstance(keys.get("pattern"), str):
        raise DataError(f"the rule '{name}' has no pattern", where=where, way_out="pattern: 'a regular expression'")
    for key, value in keys.items():
        if key not in known or key == "name":
            raise DataError(f"unknown key '{key}' in the rule '{name}'", where=where, way_out=suggest(key, known))
        if key in ("at_least", "at_most") and (type(value) is not int or value < 0):
            raise DataError(f"{key} of the rule '{name}' is {value!r}", where=where, way_out="a number of matches")
        if key == "in_reference" and type(value) is not bool:
            raise DataError(f"in_reference of the rule '{name}' is {value!r}", where=where, way_out="true or false")
    try:
        return Rule(name, **{**keys, "pattern": re.compile(keys["pattern"])})
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"the pattern of the rule '{name}' is none: {error}", where=where) from None
