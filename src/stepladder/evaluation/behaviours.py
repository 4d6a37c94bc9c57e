"""What a base can do that no row of a training set shows: a suite of behaviours, each answer checked by program.

Forgetting seldom shows in one loss alone: a model that has learned a house's style still predicts general
knowledge, and no longer answers in JSON. The suite lies in data/behaviours.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder import generators, installation
from stepladder.data import formats
from stepladder.data import read as data_read
from stepladder.data.columns import find_question_shape
from stepladder.errors import FAULT, GOOD, LOOK, WORSE, DataError, Verdict
from stepladder.evaluation import generation
from stepladder.evaluation.metrics import can_differ, words
from stepladder.evaluation.questions import Answer, Question
from stepladder.suggest import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITE = Path("data/behaviours.jsonl")
ALL, TOOL = "all behaviours", "calls a tool"
REPETITIONS, TEMPERATURE, SEED = 3, 0.3, 42  # of the base's answers, for the noise floor
COULD = 0.1  # the share of answers below which the base could not: it has nothing to forget
REFUSAL = re.compile(
    r"\bI(?:'m| am)(?: (?:really|very|truly|so))? sorry\b|\bI(?: can't| can ?not| won't| will not)\b"
    r"|\bI(?:'m| am) (?:unable|not able)\b|\bI must (?:decline|refuse)\b|\bas an AI\b",
    re.IGNORECASE,
)


class Task(NamedTuple):
    """A question of the suite; what `expected` means is the behaviour's own (see CHECKS)."""

    behaviour: str
    question: Question
    expected: Any


class Tried(NamedTuple):
    """What a model did: its answer to each task, None where it was not asked, and 1.0 or 0.0 for each.

    `repeated` holds the checks of the same tasks, answered again by sampling: empty but for the base.
    """

    tasks: list[Task]
    answers: list[str | None]
    kept: list[float | None]
    repeated: list[list[float | None]]


class Behaviour(NamedTuple):
    """How an answer is checked, and within how many tokens it must be given.

    `fits` says whether a row's `expected` is of the form that the check reads.
    """

    check: Callable[[Answer, Any], bool]
    max_new_tokens: int
    fits: Callable[[Any], bool]


def _json(answer: Answer, keys: list[str]) -> bool:
    """The first object in the answer, alone or in a fence or a sentence, is JSON and has the keys."""
    try:
        found, _ = json.JSONDecoder().raw_decode(answer.text[answer.text.index("{") :])
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= set(keys)


def _number(answer: Answer, result: int) -> bool:
    """The result is the last number of the answer (GSM8K's rule: a derivation may come before it)."""
    numbers = re.findall(r"\d+(?:\.\d+)?", answer.text.replace(",", ""))
    return bool(numbers) and float(numbers[-1]) == result


def _length(answer: Answer, most: int) -> bool:
    """It ends by itself, within so many words, and says something."""
    return answer.stopped and 1 <= len(words(answer.text)) <= most


def _language(answer: Answer, code: str) -> bool:
    from py3langid import classify

    return bool(words(answer.text)) and str(classify(answer.text)[0]) == code


def _helps(answer: Answer, _: Any) -> bool:
    return bool(words(answer.text)) and not REFUSAL.search(answer.text.replace("’", "'"))


def _calls(answer: Answer, call: dict[str, str]) -> bool:
    """The tool's name, and behind a bracket or an equals sign the argument: as JSON, Python or tags have a call."""
    name, value = re.escape(call["name"]), re.escape(call["argument"])
    return bool(re.search(rf"\b{name}\b.*?[({{=>].*?\b{value}\b", answer.text, re.DOTALL | re.IGNORECASE))


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "argument"))


# The tokens are what an answer to the suite's own questions takes: they are most of its cost.
CHECKS = {
    "answers in JSON": Behaviour(
        _json, 32, lambda keys: isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    ),
    "arithmetic": Behaviour(_number, 20, lambda result: type(result) is int),
    "keeps to a length": Behaviour(_length, 32, lambda most: type(most) is int and most > 0),
    "keeps the language": Behaviour(_language, 20, lambda code: isinstance(code, str)),
    "does not refuse": Behaviour(_helps, 16, lambda value: value is True),
    TOOL: Behaviour(_calls, 40, _is_call),
}


def read(path: Path = SUITE) -> list[Task]:
    """The tasks of a suite, behaviour by behaviour.

    Raises:
        DataError: no such file, or a row of another form.
    """
    tasks = []
    for where, row in data_read.read(installation.locate(path)):
        if isinstance(row, DataError):
            raise row
        name = row.get("behaviour")
        if name not in CHECKS:
            help = suggest(str(name), CHECKS) or "one of " + ", ".join(CHECKS)
            raise DataError(f"'{name}' is no behaviour that can be checked", where=where, help=help)
        asked: dict[str, Any] = {key: row[key] for key in ("prompt", "tools") if key in row}
        if unknown := row.keys() - asked.keys() - {"behaviour", "expected"}:
            help = "behaviour, prompt, tools, expected"
            raise DataError(f"unknown keys: {', '.join(sorted(unknown))}", where=where, help=help)
        if not CHECKS[name].fits(row.get("expected")) or (name == TOOL) != ("tools" in asked):
            what = f"'{name}' does not go with expected: {row.get('expected')!r}, tools: {row.get('tools')!r}"
            raise DataError(what, where=where, help=f"as in the other rows of {SUITE}")
        example, _ = formats.to_prompt(asked, where, find_question_shape(asked, where))
        question = Question(example["messages"], tools=example.get("tools"))
        tasks.append(Task(str(name), question, row["expected"]))
    if not tasks:
        raise DataError(f"{path} holds no task", help=f"rows as in {SUITE}")
    return sorted(tasks, key=lambda task: [*CHECKS].index(task.behaviour))


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], repetitions: int = 0
) -> Tried:
    """The model's answers to the tasks, greedy, and their checks; the ranks share the behaviours out.

    Where the chat template takes no tools, no tool can be called, and the answers of that behaviour are None.

    Args:
        repetitions: how many times it is asked again, by sampling at TEMPERATURE with a fixed seed.
    """
    import torch

    groups = {name: [task for task in tasks if task.behaviour == name] for name in CHECKS}
    asked = [
        name
        for name, group in groups.items()
        if group and (not group[0].question.tools or generation.can_be_asked(tokenizer, group[0].question))
    ]

    def answers_to(name: str) -> list[list[Answer]]:
        """The greedy answers to a behaviour's questions, and those of each repetition."""
        talks = [task.question.example for task in groups[name]]

        def answers(times: int, **sampling: Any) -> list[Answer]:
            most, size = CHECKS[name].max_new_tokens, len(talks) * max(times, 1)
            return generation.generate_answers(
                model, tokenizer, talks * times, batch_size=size, shared=False, max_new_tokens=most, **sampling
            )

        found = answers(1)
        with generators.unchanged():
            torch.manual_seed(SEED)
            # weights that are no number cannot be sampled from otherwise
            found += answers(repetitions, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                             remove_invalid_values=True)  # fmt: skip
        return [found[start : start + len(talks)] for start in range(0, len(found), len(talks))]

    said = dict(zip(asked, generation.parallel_map(asked, answers_to), strict=True))
    ordered = [task for group in groups.values() for task in group]
    rounds = [
        [
            answer
            for name, group in groups.items()
            for answer in (said[name][n] if name in said else [None] * len(group))
        ]
        for n in range(repetitions + 1)
    ]
    texts = [answer.text if answer else None for answer in rounds[0]]
    kept, *repeated = ([*map(_kept, ordered, answers)] for answers in rounds)
    return Tried(ordered, texts, kept, repeated)


def _kept(task: Task, answer: Answer | None) -> float | None:
    return float(CHECKS[task.behaviour].check(answer, task.expected)) if answer else None


def columns(tried: Tried | None, base: Tried) -> dict[str, list[float | None]]:
    """A value a task for each behaviour that the base was asked for, and for all that the base could, together.

    What the base could be asked and the other could not counts as not kept: its template lost the tools.
    """
    found: dict[str, list[float | None]] = {}
    if tried:
        for task, mine, of_base in zip(tried.tasks, tried.kept, base.kept, strict=True):
            if of_base is not None:
                found.setdefault(task.behaviour, []).append(mine or 0.0)
        could = [name for name in found if _share(base, [name]) >= COULD]
        found |= {ALL: [value for name in could for value in found[name]]} if could else {}
    return found


def noise(base: Tried, name: str) -> float:
    """How far apart the shares of the base's own repetitions lie: a smaller drop is none."""
    could = [one for one in CHECKS if _share(base, [one]) >= COULD] if name == ALL else [name]
    shares = [_share(base, could, kept) for kept in (base.kept, *base.repeated)]
    return max(shares) - min(shares)


def _share(tried: Tried, names: list[str], kept: list[float | None] | None = None) -> float:
    """The share of answers that keep these behaviours; 0 where nothing was asked."""
    checks = zip(tried.tasks, kept or tried.kept, strict=True)
    values = [value for task, value in checks if task.behaviour in names and value is not None]
    return sum(values) / max(len(values), 1)


def rows_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a comparison's table that are behaviours."""
    return [row for row in metrics if "noise" in row]


def verdict(metrics: list[dict[str, Any]], number: int) -> Verdict | None:
    """Whether a side lost what its base could; None where it was not asked.

    Args:
        metrics: the rows of the comparison's table, judged.
        number: which side it is.
    """
    measured = [row for row in rows_of(metrics) if row["sides"][0] and row["sides"][number]]
    if not measured:
        return None
    could = [row for row in measured if row["sides"][0]["mean"] >= COULD]
    could_not = [row["name"] for row in measured if row not in could]
    lost = [row for row in could if row["tests"][number]["verdict"] == WORSE]
    kept_by_base = sum(could_break(row) for row in could if row["name"] != ALL)
    figures = {f"{row['name']}: {when}": row["sides"][side]["mean"]
               for row in measured for when, side in (("before", 0), ("after", number))}  # fmt: skip
    evidence = "; ".join(describe_change(row, number) for row in [*lost, *(row for row in could if row not in lost)])
    evidence += "; " * bool(could) + f"the base could not: {', '.join(could_not)}" if could_not else ""
    if lost:
        what, help = "It lost what its base could do.", "rows that show it among the training rows, mix_general: 0.1"
        return Verdict(FAULT, "lost a behaviour", what, evidence, f"{help}, a lower learning_rate", figures)
    if not can_differ(kept_by_base):
        what = f"The base keeps {kept_by_base} tasks of the suite: too few to show a loss."
        return Verdict(LOOK, "behaviours not judged", what, evidence, "compare with a base that was tuned to follow "
                       "instructions", figures)  # fmt: skip
    return Verdict(GOOD, "behaves as its base", "No behaviour was shown to be lost.", evidence, figures=figures)


def could_break(row: dict[str, Any]) -> int:
    """In how many answers the base keeps a behaviour: those that another can lose."""
    return round(row["sides"][0]["mean"] * row["sides"][0]["rows"])


def describe_change(row: dict[str, Any], number: int) -> str:
    before, after = (row["sides"][side]["mean"] for side in (0, number))
    return f"{row['name']} {before:.0%} → {after:.0%} (noise {row['noise']:.0%})"
