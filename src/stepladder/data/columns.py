"""What a row's columns say: the shape that it has, the `column_map` that gives it one, and what is not used.

The help of an error is a `column_map` only where that reads the row rightly.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from typing import Any, NamedTuple

from stepladder.data import formats
from stepladder.data.conversation import KNOWN_KEYS, NAMES, RoleMap, invert_names, yaml_name
from stepladder.data.formats import Example
from stepladder.data.readers import Found, Row, quote
from stepladder.errors import DataError, locate_errors
from stepladder.suggest import normalize

UNKNOWN_KEYS = "unknown_keys"
MOST_NAMES = 20  # unused columns, or keys of messages, that are named
LONG_NAME = 40  # characters from which a name is cut
# Beside one of these a row of no known shape is no question without an answer.
ANSWER_COLUMNS = ("response", "answer", "output", "completion", "reply", "target")
# What a question's column is called elsewhere, the column that it is read as, and how its answer's may be called.
ASKED = {name: (kind["column"], NAMES[kind["answers"]]) for kind in NAMES["questions"] for name in kind["names"]}
ANSWERS = NAMES["answers"]
BESIDE = invert_names(NAMES["beside"])
# The column that the answer is read as, by the question's: that of the first shape.
PARTNER: dict[str, str] = {shape.asked: shape.answer for shape in formats.SHAPES[::-1] if shape.answer}
ONE_SLIP = 0.86  # of difflib's ratio
TYPO_LETTERS = 5  # from which length one slip in a name does not make it another word
ANY = 'in the recipe: column_map: {input: COLUMN, output: COLUMN}; or rows {"messages": [{"role": "user", …}, …]}'


def find_shape(row: Row, where: str) -> formats.Shape:
    """The shape that a row's columns show.

    Raises:
        DataError: none; the message lists what was seen, what is known, and how to map one to the other.
    """
    with locate_errors(where):
        for shape in formats.SHAPES:
            if shape.columns <= row.keys():
                return shape
        raise DataError(
            f"columns {', '.join(map(quote, row)) or '(none)'} are of no known shape",
            why=f"known: {'; '.join(map(str, formats.SHAPES))}",
            help=_hint(row),
        )


def find_question_shape(row: Row, where: str) -> formats.Shape:
    """The shape of a row that need not have an answer.

    Raises:
        DataError: no column holds a question, or an answer's column stands beside none that is known.
    """
    with locate_errors(where):
        for shape in formats.SHAPES:
            if shape.columns <= row.keys() and shape.name != "text":
                return shape
        if any(formats.is_filled(row.get(column)) for column in ANSWER_COLUMNS):
            if (shape := find_shape(row, where)).name != "text":
                return shape
        else:
            for shape in formats.SHAPES:
                if shape.columns - {shape.answer} <= row.keys():
                    return shape
        raise DataError("this row holds no prompt", help='{"prompt": "…"}, or the training rows\' columns')


def usual_shape(head: list[Found]) -> formats.Shape:
    """The shape that most of a set's first rows have: it is the others that are wrong.

    Raises:
        DataError: none of them has a known shape, or there is none.
    """
    shapes: Counter[formats.Shape] = Counter()
    fault: DataError | None = None
    for where, row in head:
        try:
            if isinstance(row, DataError):
                raise row
            shapes[find_shape(row, where)] += 1
        except DataError as error:
            fault = fault or error
    if not shapes:
        raise fault or DataError("the set holds no row", help="another split or file")
    return shapes.most_common(1)[0][0]


class Remark(NamedTuple):
    """What a person should know of a set's rows, and what to do about it (may be empty)."""

    name: str  # for programs
    what: str
    help: str = ""

    def __str__(self) -> str:
        return self.what + f"; {self.help}" * bool(self.help)


class Converter:
    """Turns the rows of a set into examples, and counts what they hold that no example does.

    Args:
        label: what a person calls the set.
        shape: the shape of its rows; None where each row shows its own.
        role_map: the recipe's, if it has one.
    """

    def __init__(self, label: str, shape: formats.Shape | None, role_map: dict[str, str] | None = None):
        self.label, self.shape = label, shape
        self.role_map = RoleMap(role_map) if role_map else None
        self.columns: Counter[str] = Counter()  # rows, by column that is not used
        self.keys: Counter[str] = Counter()  # messages, by key without a known meaning
        self.column_map: dict[str, str] = {}  # that reads unused columns
        self.rows = 0
        self.present: Counter[str] = Counter()  # rows, by column of that map

    def example(self, where: str, row: Row | DataError) -> Example:
        """As `formats.to_example`; a fault in a row's stead is raised."""
        if isinstance(row, DataError):
            raise row
        shape = self.shape or find_shape(row, where)
        example = formats.to_example(row, where, shape, self.role_map)
        self.count(row, shape, example)
        return example

    def count(self, row: Row, shape: formats.Shape, example: Example) -> None:
        """Count the columns of a row that are not used, and the keys of its messages that nobody knows."""
        self.rows += 1
        for column in formats.unused_columns(row, shape):
            if column not in self.columns:
                self.column_map = _map_unused(column, row[column], shape.used, row) | self.column_map
            self.columns[column] += 1
        for column in self.column_map.values():
            self.present[column] += column in row
        if "answers" in shape.columns and len(formats.listed_answers(row["answers"])) > 1:
            self.columns["answers, all but the first"] += 1
        for message in example.get("messages", ()):
            if len(message) > 2:
                self.keys.update(message.keys() - KNOWN_KEYS)

    def remarks(self, scope: str = "") -> list[Remark]:
        """What was counted; `scope` names the rows that were looked at where that is not the whole set."""
        found, place = [], f"{self.label}{scope}"
        if self.columns:
            what = f"{place}: columns that are not used: {_names(self.columns, 'row')}"
            found.append(Remark("unused_columns", what, self._help()))
        if self.keys:
            what = f"{place}: keys of messages that only the chat template may use: {_names(self.keys, 'message')}"
            found.append(Remark(UNKNOWN_KEYS, what))
        if self.role_map and (absent := self.role_map.roles.keys() - self.role_map.seen):
            names = ", ".join(map(quote, sorted(absent, key=str)))
            what = f"{place}: role_map names {names}, which no conversation has"
            found.append(Remark("unused_roles", what))
        return found

    def _help(self) -> str:
        """The `column_map` that reads unused columns; it needs them in every row."""
        if not self.column_map:
            return ""
        read = [quote(column) for column in self.column_map.values() if column in self.columns]
        partial = any(self.present[column] < self.rows for column in self.column_map.values())
        return f"{column_map(self.column_map)} reads {', '.join(read)}" + ", once every row has it" * partial


def _names(counts: Counter[str], unit: str) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{_name(name)} ({count:,} {unit}{'s' * (count != 1)})" for name, count in ranked[:MOST_NAMES]]
    return ", ".join(listed) + f" and {len(ranked) - MOST_NAMES:,} more" * (len(ranked) > MOST_NAMES)


def _name(name: str) -> str:
    return name if name.isprintable() and name.strip() and len(name) <= LONG_NAME else quote(name, LONG_NAME)


def _hint(row: Row) -> str:
    """What helps for a row of no known shape: a `column_map` that reads it rightly, or the form that it needs."""
    names = {normalize(column): column for column in reversed(row)}
    if "input_ids" in names:
        return "rows of token ids are not read: give the texts, which are tokenized and masked here"
    if "chosen" in names and "rejected" in names:
        return _preference(row, names)
    if talks := {column: talk for column, value in row.items() if (talk := _messages(value))}:
        (column, talk), *others = talks.items()
        # Several may be two models' answers to compare, and an answer beside one is its end.
        if others or not names.keys().isdisjoint(ANSWERS) or _role(talk[-1]) in ("user", "human", "system", "tool"):
            return ANY
        return _in_recipe({"messages": column} | _beside(names, "messages"))
    mapping = _pair(row, names)
    if mapping and any(map(_calls, row.values())):
        return 'rows {"messages": […]} with the calls as tool_calls: as text they would be trained as words'
    if mapping:
        return _in_recipe(mapping)
    if text := next(
        (names[name] for name in NAMES["documents"] if name in names and isinstance(row[names[name]], str)), None
    ):
        return _in_recipe({"text": text}) + " (documents that are trained whole)"
    return ANY


def _map_unused(column: str, value: Any, used: frozenset[str], present: Row) -> dict[str, str]:
    """The `column_map` by which a column that is not used would be read; empty where none is known to be right.

    Args:
        value: what the column holds in the first row that has it.
        used: the columns that the set's shape reads.
        present: that row.
    """
    name = normalize(column)
    target = BESIDE.get(name) or ("reasoning_content" if name in NAMES["reasoning"] and isinstance(value, str) else "")
    if target in used and target not in present:
        return {target: column}
    if "text" in used and isinstance(value, str):
        if name == "label":
            return {"input": "text", "output": column}
        if name in NAMES["summaries"]:
            return _changes({"document": "text", "summary": column})
    return {}


def _in_recipe(mapping: dict[str, str]) -> str:
    return f"in the recipe: {column_map(mapping)}"


def column_map(mapping: dict[str, str]) -> str:
    return f"column_map: {{{', '.join(f'{new}: {yaml_name(old)}' for new, old in mapping.items())}}}"


def _calls(value: Any) -> bool:
    """Whether a text is a list of tool calls (xLAM)."""
    return isinstance(value, str) and value.lstrip().startswith("[") and '"name"' in value and '"arguments"' in value


def _messages(value: Any) -> list[dict[str, Any]]:
    """A list of messages, as it is or out of JSON text; empty where the value is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    is_talk = isinstance(value, list) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)
    return value if is_talk else []


def _role(message: dict[str, Any]) -> Any:
    return message.get("role") or message.get("from")


def _preference(row: Row, names: dict[str, str]) -> str:
    """SFT on the chosen answers: their whole conversations, or the answers to a prompt."""
    chosen, only = row[names["chosen"]], " (SFT on the chosen answers; the rejected ones are left out)"
    if talk := _messages(chosen):
        if any(_role(message) in ("user", "human") for message in talk):
            return _in_recipe({"messages": names["chosen"]}) + only
        if _messages(row.get("prompt")):
            return _in_recipe({"completion": names["chosen"]}) + only
    texts = {name for name, column in names.items() if isinstance(row[column], str)}
    asked = next((name for name in ASKED if name in texts and ANSWERS in ASKED[name]), None)
    if asked is None or talk or not isinstance(chosen, str):
        return 'for SFT, make rows {"messages": […]} of the chosen answers; the rejected ones must not be trained'
    target, _ = ASKED[asked]
    mapping = {target: names[asked], PARTNER[target]: names["chosen"]}
    return _in_recipe(_changes(mapping | _beside(names, target))) + only


def _pair(row: Row, names: dict[str, str]) -> dict[str, str]:
    """The map that makes two columns a question and its answer; empty where either is not recognized."""
    texts = {_without_typo(name): old for name, old in names.items() if not isinstance(row[old], list | dict)}
    for asked, (target, answers) in ASKED.items():
        if asked in texts and (answered := next((name for name in answers if name in texts), None)):
            mapping = {target: texts[asked], PARTNER[target]: texts[answered]}
            return _changes(mapping | _beside(names, target))
    return {}


def _without_typo(name: str) -> str:
    """The recognized name that a long name is one slip away from; else the name itself."""
    known = [*ASKED, *ANSWERS]
    if len(name) < TYPO_LETTERS or name in known:
        return name
    long = [other for other in known if len(other) >= TYPO_LETTERS and abs(len(other) - len(name)) < 2]
    return next(iter(difflib.get_close_matches(name, long, n=1, cutoff=ONE_SLIP)), name)


def _beside(names: dict[str, str], target: str) -> dict[str, str]:
    """The columns beside question and answer whose name differs from the one that is read."""
    found: dict[str, str] = {}
    for name, new in BESIDE.items():
        fits = {"input": target == "instruction", "context": target in ("instruction", "question"),
                "history": target != "messages"}.get(new, True)  # fmt: skip
        if fits and name in names and new not in found:
            found[new] = names[name]
    return {new: column for new, column in found.items() if new != column}


def _changes(mapping: dict[str, str]) -> dict[str, str]:
    return {new: old for new, old in mapping.items() if new != old}
