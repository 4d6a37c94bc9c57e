"""The `column_map` that a message suggests for columns of no known shape, and for columns that are not used."""

from __future__ import annotations

import difflib
import json
from typing import Any

from stepladder.data.conversation import yaml_name
from stepladder.data.readers import Row

# What an answer's column is called elsewhere.
ANSWERS = (
    *("output", "answer", "response", "completion", "solution", "generated_solution", "target", "targets", "reply"),
    *("antwort", "respuesta", "réponse", "答案", "答", "回答"),
)
SUMMARIES = ("summary", "highlights")
SPEAKERS = ("assistant", "bot", "gpt")
# What a question's column is called elsewhere, the column that it is read as, and how its answer's may be called:
# `user` beside `response` may be a name. The order decides between two.
ASKED = {
    **{name: (name, ANSWERS) for name in ("instruction", "question", "query", "prompt")},
    "problem": ("question", ANSWERS),
    **dict.fromkeys(("article", "document"), ("document", SUMMARIES)),
    **dict.fromkeys(("user", "human"), ("input", SPEAKERS)),
    **dict.fromkeys(("request", "inputs", "frage", "pregunta", "问题", "问", "指令", "input"), ("input", ANSWERS)),
}
PARTNER = {  # the column that the answer is read as, by the question's
    "instruction": "output",
    "question": "answer",
    "query": "response",
    "prompt": "completion",
    "document": "summary",
    "input": "output",
}
BESIDE = {  # columns beside question and answer, and what they are read as
    **dict.fromkeys(("system", "system_prompt", "system_message"), "system"),
    **dict.fromkeys(("tools", "functions"), "tools"),
    "input": "input",
    "context": "context",
    "history": "history",
}
REASONING = ("reasoning", "thinking", "thought", "cot", "complex_cot", "chain_of_thought")
TEXTS = ("text", "content", "body")  # documents without a question
ONE_SLIP = 0.86  # of difflib's ratio
TYPO_LETTERS = 5  # from which length one slip in a name does not make it another word
ANY = 'in the recipe: column_map: {input: COLUMN, output: COLUMN}; or rows {"messages": [{"role": "user", …}, …]}'


def for_row(row: Row) -> str:
    """What helps for a row of no known shape: a `column_map` that reads it rightly, or the form that it needs."""
    names = {_normal(column): column for column in reversed(row)}
    if "input_ids" in names:
        return "rows of token ids are not read: give the texts, which are tokenized and masked here"
    if "chosen" in names and "rejected" in names:
        return _preference(row, names)
    if talks := {column: talk for column, value in row.items() if (talk := _messages(value))}:
        (column, talk), *others = talks.items()
        # Several may be two models' answers to compare, and an answer beside one is its end.
        if others or not names.keys().isdisjoint(ANSWERS) or _role(talk[-1]) in ("user", "human", "system", "tool"):
            return ANY
        return in_recipe({"messages": column} | _beside(names, "messages"))
    mapping = _pair(row, names)
    if mapping and any(map(_calls, row.values())):
        return 'rows {"messages": […]} with the calls as tool_calls: as text they would be trained as words'
    if mapping:
        return in_recipe(mapping)
    if text := next((names[name] for name in TEXTS if name in names and isinstance(row[names[name]], str)), None):
        return in_recipe({"text": text}) + " (documents that are trained whole)"
    return ANY


def for_unused(column: str, value: Any, used: frozenset[str], present: Row) -> dict[str, str]:
    """The `column_map` by which a column that is not used would be read; empty where none is known to be right.

    Args:
        value: what the column holds in the first row that has it.
        used: the columns that the set's shape reads.
        present: that row.
    """
    name = _normal(column)
    target = BESIDE.get(name) or ("reasoning_content" if name in REASONING and isinstance(value, str) else "")
    if target in used and target not in present:
        return {target: column}
    if "text" in used and isinstance(value, str):
        if name == "label":
            return {"input": "text", "output": column}
        if name in SUMMARIES:
            return _changes({"document": "text", "summary": column})
    return {}


def in_recipe(mapping: dict[str, str]) -> str:
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
            return in_recipe({"messages": names["chosen"]}) + only
        if _messages(row.get("prompt")):
            return in_recipe({"completion": names["chosen"]}) + only
    texts = {name for name, column in names.items() if isinstance(row[column], str)}
    asked = next((name for name in ASKED if name in texts and ANSWERS in ASKED[name]), None)
    if asked is None or talk or not isinstance(chosen, str):
        return 'for SFT, make rows {"messages": […]} of the chosen answers; the rejected ones must not be trained'
    target, _ = ASKED[asked]
    mapping = {target: names[asked], PARTNER[target]: names["chosen"]}
    return in_recipe(_changes(mapping | _beside(names, target))) + only


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
    known = (*ASKED, *ANSWERS)
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


def _normal(column: str) -> str:
    return column.strip().casefold().replace("-", "_").replace(" ", "_")
