"""Where the thoughts of an assistant's turn stand in its text, with their marks: `train_on_reasoning` masks them.

Most templates write a thought as `<think>…</think>`, or leave it in the answer where the row has it so. Others have
marks of their own (gpt-oss: `<|channel|>analysis<|message|>…<|end|>`): there a thought is found by its place in the
layout, and its marks are what the template writes before it and the first tag after it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from stepladder.data.templates.chat_template import THOUGHT_END, Slot

if TYPE_CHECKING:
    from stepladder.data.templates.layout import TemplateLayout, Turn

THOUGHT_START = "<think>"
# A thought; one that the generation prompt has opened; an empty one, which some templates write before each answer.
THOUGHTS = re.compile(r"(?:\A(?:(?!<think>).)*?|<think>.*?)</think>\s*", re.DOTALL)
CLOSING = re.compile(r"\s*(?:</?[^<>\s]{1,40}>)?\s*")
NOT_READ = ("argument", "name", "id", "result")  # slots whose text is never a thought, whatever it holds


def find_thoughts(
    text: str, turn: Turn, layout: TemplateLayout, slots: list[Slot], starts: list[int], span: tuple[int, int]
) -> list[tuple[int, int]]:
    """The characters of the thoughts in a trained turn, each from its opening mark to the answer after it.

    Args:
        text: of the whole row.
        starts: where each literal of the layout begins in it.
        span: the turn's characters.
    """
    first, end = span
    scanned, found = list(text[first:end]), []
    for number in range(turn.start.literal, turn.end.literal):
        slot, after = slots[layout.order[number]], layout.literals[number + 1]
        begin, close = starts[number] + len(layout.literals[number]), starts[number + 1]
        if slot.kind in NOT_READ:
            scanned[begin - first : close - first] = "." * (close - begin)
        elif slot.kind == "reasoning":  # its own text may speak of the mark
            own = text[begin:close].replace(THOUGHT_END, "." * len(THOUGHT_END))
            scanned[begin - first : close - first] = own
            if THOUGHT_END not in after:
                own_edge = slot.edges[1] if after.startswith(slot.edges[1]) else ""
                closed = CLOSING.match(after, len(own_edge))
                assert closed is not None  # it matches the empty text too
                found.append((max(first, starts[number]), close + closed.end()))
    found += [(first + thought.start(), first + thought.end()) for thought in THOUGHTS.finditer("".join(scanned))]
    return sorted(found)


def is_masked(example: dict[str, Any], message: int, train_on_reasoning: str) -> bool:
    """Whether the thoughts of the assistant's message have no loss.

    The last turn is all that the assistant says after the last question, calls of tools included: templates that drop
    the thoughts of earlier turns keep these.
    """
    if train_on_reasoning != "last":
        return train_on_reasoning == "none"
    roles = [each["role"] for each in example["messages"]]
    last = max(number for number, role in enumerate(roles) if role == "assistant")
    return message < max((number for number in range(last) if roles[number] == "user"), default=-1)
