"""Where a chat template puts each text of a conversation, learnt by rendering marks in place of the texts.

A chat template is a program: it may drop a text, move it, change it, or render earlier turns
differently. So a conversation is rendered once with a mark in place of each text. Which marks come
out, in which order and with what between them, is the layout of every conversation of that form;
a row's own rendering must be exactly that layout filled with its texts. What is trained follows
from the layout: an assistant turn begins where the generation prompt ends, and ends with the last
special token that closes the turn wherever it stands.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from stepladder.data.formats import Example
from stepladder.data.templates.chat_template import (
    OTHER,
    Dialect,
    Refusal,
    Slot,
    TemplateProgram,
    dialects,
    json_forms,
    mark,
    parts,
    plain_slots,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAG = re.compile(r"</?[^<>\s]{1,40}>")
STARTS = re.compile(r"start|begin", re.IGNORECASE)  # in the name of a token that opens something
PRINTED_PART = re.compile(r"""['"]type['"]: ?['"]text['"]""")
MOST_LAYOUTS = 2000  # that are remembered


class Point(NamedTuple):
    """A place in a rendered text: so many characters into the literal with this number."""

    literal: int
    offset: int


@dataclass(frozen=True)
class Turn:
    """What is trained of the assistant's message with this number.

    `ends` is the special token that closes the turn, "" where the template closes it by none. `appended`
    is that token where the template writes it with the next turn only (GLM), which the last turn lacks.
    `opened` is what the generation prompt writes beyond the turn's own beginning (`<think>`), `unasked` what
    the turn begins with where the template has no generation prompt.
    """

    message: int
    start: Point
    end: Point
    ends: str
    appended: str
    opened: str
    unasked: str


@dataclass
class TemplateLayout:
    """The literals of a rendered conversation, and the numbers of the slots between them."""

    dialect: Dialect
    literals: list[str]
    order: list[int]
    lost: list[int]  # the numbers of required slots that are not rendered
    lost_tools: list[str]  # names and descriptions of tools that are not
    lost_keys: list[str] = field(default_factory=list)  # names of calls' arguments that are not
    turns: list[Turn] = field(default_factory=list)
    changed: bool = False  # an earlier turn is rendered differently than when it was the last
    spliced: Point | None = None  # up to here the text is a generation prompt, from here on the last turn

    def find(self, text: str, slots: list[Slot]) -> list[int] | Slot:
        """Where each literal begins in a row's rendered text, or the slot whose text is not there as it is."""
        if not self.order:
            return [0] if text == self.literals[0] else Slot(0, "content", text)
        at, starts = 0, []
        for number, literal in enumerate(self.literals):
            if not text.startswith(literal, at):
                return slots[self.order[max(number - 1, 0)]]
            starts.append(at)
            at += len(literal)
            if number < len(self.order):
                slot, rest = slots[self.order[number]], self.literals[number + 1]
                forms = json_forms(slot.text) if slot.kind in ("argument", "result") else (slot.text,)
                ends = [at + len(form) for form in forms if text.startswith(form, at)]
                end = next((end for end in ends if text.startswith(rest, end)), None)
                if end is None:  # where the text is there and what follows is not, the next text decides
                    return slots[self.order[number + 1]] if ends and number + 1 < len(self.order) else slot
                at = end
        return starts if at == len(text) else slots[self.order[-1]]


class ChatTemplate(TemplateProgram):
    """A tokenizer's chat template, and the layouts of the conversations that it has rendered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.layouts: dict[str, TemplateLayout | Refusal] = {}
        self.plain: dict[tuple[str, ...], TemplateLayout] = {}  # of conversations of plain texts, by their roles

    def row_text(self, example: Example, layout: TemplateLayout, slots: list[Slot]) -> str:
        """A row's text by its layout.

        Raises:
            Refusal: the template raises an error.
        """
        if layout.spliced is None:
            return self.text(example, layout.dialect)
        first, offset = layout.spliced
        pieces = [self.text({**example, "messages": example["messages"][:-1]}, layout.dialect, prompt=True)]
        pieces += [layout.literals[first][offset:]]
        for slot, literal in zip(layout.order[first:], layout.literals[first + 1 :], strict=True):
            pieces += [slots[slot].text, literal]
        return "".join(pieces)

    def row_layout(self, example: Example) -> tuple[list[Slot], TemplateLayout]:
        """The texts of a row, and the layout of conversations of its form.

        Raises:
            Refusal: as `layout`.
        """
        slots, roles = plain_slots(example), tuple(message["role"] for message in example["messages"])
        if slots is not None and roles in self.plain:
            return slots, self.plain[roles]
        marked_slots, marked = mark(example)
        layout = self.layout(marked_slots, marked)
        if slots is not None and len(self.plain) < MOST_LAYOUTS:
            self.plain[roles] = layout
        return marked_slots, layout

    def layout(self, slots: list[Slot], marked: Example) -> TemplateLayout:
        """The layout of conversations of this form, as `mark` gives it.

        Raises:
            Refusal: the template raises an error, or does not begin a turn as it asks for one.
        """
        key = json.dumps(marked, ensure_ascii=False)
        if key not in self.layouts:
            if len(self.layouts) >= MOST_LAYOUTS:
                self.layouts.pop(next(iter(self.layouts)))
            try:
                self.layouts[key] = self._learn(slots, marked)
            except Refusal as error:
                self.layouts[key] = error
        found = self.layouts[key]
        if isinstance(found, Refusal):
            raise found
        return found

    def _learn(self, slots: list[Slot], marked: Example) -> TemplateLayout:
        """By the template itself, or by TRL's version of it where that loses less of the conversation."""
        own = self._best(slots, marked, training=False)
        whole = isinstance(own, TemplateLayout) and _loss(own) == (0, False)
        if not whole and not self.marked and self.training:
            trl = self._best(slots, marked, training=True)
            if isinstance(trl, TemplateLayout) and (isinstance(own, Refusal) or _loss(trl) < _loss(own)):
                own = trl
        if isinstance(own, Refusal):
            raise own
        return own

    def _best(self, slots: list[Slot], marked: Example, training: bool) -> TemplateLayout | Refusal:
        best: TemplateLayout | None = None
        refusal = Refusal("it renders nothing")
        last = len(marked["messages"]) - 1
        for number, dialect in enumerate(dialects(marked, training)):
            try:
                layout = self._lay_out(dialect, slots, marked)
                if any(slots[slot].kind == "content" or slots[slot].message == last for slot in layout.lost):
                    layout = min(layout, self._splice_last_turn(layout, slots, marked), key=_loss)
            except Refusal as error:
                refusal = refusal if number else error
                continue
            if best is None or _loss(layout) < _loss(best):
                best = layout
            if _loss(layout)[0] == 0:
                break
        return best or refusal

    def _lay_out(self, dialect: Dialect, slots: list[Slot], marked: Example) -> TemplateLayout:
        text = self.text(marked, dialect)
        if dialect.parts and PRINTED_PART.search(text):
            raise Refusal("it prints parts as they are")
        literals, order = parts(text)
        lost = [number for number, slot in enumerate(slots) if slot.required and number not in order]
        calls = [call["function"]["arguments"] for m in marked["messages"] for call in m.get("tool_calls", ())]
        # `{{ arguments }}` of an object is Python's way to write it, not JSON.
        if any(str(arguments) in text for arguments in calls if arguments):
            lost += [number for number, slot in enumerate(slots) if slot.kind == "name"]
        layout = TemplateLayout(dialect, literals, order, lost, _lost_tools(marked, "".join(literals)))
        self._find_turns(layout, slots, marked)
        return layout

    def _splice_last_turn(self, whole: TemplateLayout, slots: list[Slot], marked: Example) -> TemplateLayout:
        """The layout of the last generation prompt followed by the last turn, as it is when the model answers.

        Mistral's template writes the system prompt into the last user's turn where that ends the conversation,
        so never in a whole one; R1's opens a thought, which it drops from a whole one.
        """
        messages = marked["messages"]
        asked = self._prefix(len(messages) - 1, marked, whole.dialect, prompt=True)
        ends = whole.turns and whole.turns[-1].message + 1 == len(messages)
        if asked is None or not ends or "tool_calls" in messages[-1]:
            return whole
        turn = whole.turns[-1]
        first, start = turn.start
        literals, order = [whole.literals[first][start:], *whole.literals[first + 1 :]], whole.order[first:]
        if turn.opened and messages[-1]["content"].startswith(turn.opened):
            literals, order = parts(messages[-1]["content"].removeprefix(turn.opened))
            literals[-1] += whole.literals[turn.end.literal]
        literals = [*asked[0][:-1], asked[0][-1] + literals[0], *literals[1:]]
        order = asked[1] + order
        lost = [number for number, slot in enumerate(slots) if slot.required and number not in order]
        layout = TemplateLayout(whole.dialect, literals, order, lost, _lost_tools(marked, "".join(literals)))
        layout.spliced = Point(len(asked[0]) - 1, len(asked[0][-1]))
        self._find_turns(layout, slots, marked)
        return layout

    def _find_turns(self, layout: TemplateLayout, slots: list[Slot], marked: Example) -> None:
        # A result may repeat the name of its call: where a text stands first is its place.
        order = layout.order
        first = [(order.index(slot), slots[slot]) for slot in dict.fromkeys(order) if slots[slot].required]
        for number, message in enumerate(marked["messages"]):
            places = [place for place, slot in first if slot.message == number]
            if message["role"] == "assistant" and places:
                layout.turns.append(self._turn(number, places, layout, slots, marked))
                written = "".join(layout.literals[places[0] : places[-1] + 2])
                calls = message.get("tool_calls", ())
                keys = [key for call in calls for key in call["function"]["arguments"]]
                layout.lost_keys += [key for key in keys if not _stands(key, written)]
        talk = [slot for _, slot in first if slot.kind in ("content", "result")]
        talk = [slot for slot in talk if marked["messages"][slot.message]["role"] not in ("system", "developer")]
        if any(a.message > b.message for a, b in itertools.pairwise(talk)):
            raise Refusal("it renders the turns in another order")
        if any(order.count(slot) > 1 for slot in order if slots[slot].kind == "content"):
            raise Refusal("it renders a text twice")

    def _turn(self, number: int, places: list[int], layout: TemplateLayout, slots: list[Slot], marked: Example) -> Turn:
        first, last = places[0], places[-1]
        if any(slots[slot].message != number and slots[slot].required for slot in layout.order[first:last]):
            raise Refusal("it renders another message inside the assistant's")
        while last + 1 < len(layout.order) and not slots[layout.order[last + 1]].required:
            if self.special.search(layout.literals[last + 1]):
                break  # else the id of a call stands before its end (Mistral)
            last += 1
        before, after = layout.literals[first], layout.literals[last + 1]
        start, opened, unasked = self._start(number, before, marked, layout.dialect)
        if unasked.strip() == slots[layout.order[first]].edges[0].strip():
            unasked = ""  # the row's own
        alone = self._prefix(number + 1, marked, layout.dialect)  # the conversation when this turn was the last
        if alone is not None:
            literals, order = alone
            own = [order.index(slot) for slot in dict.fromkeys(order) if slots[slot].message == number]
            inner = layout.literals[first + 1 : last + 1]
            layout.changed |= not own or [before[start:], *inner] != [
                literals[own[0]][start:],
                *literals[own[0] + 1 : own[-1] + 1],
            ]
        length, ends, appended = self._end(number, after, alone, marked, layout.dialect)
        return Turn(number, Point(first, start), Point(last + 1, length), ends, appended, opened, unasked)

    def _start(self, number: int, before: str, marked: Example, dialect: Dialect) -> tuple[int, str, str]:
        """How much of the text before a turn is its header; what the generation prompt has beyond it; and what
        the turn has beyond a prompt that the template does not write.
        """
        asked = self._prefix(number, marked, dialect, prompt=True)
        if asked is not None:
            tail = asked[0][-1]
            common = self._common(before, tail)
            own = before[common:]
            if common == len(tail) and not own.strip():
                return common, "", ""
            plain = self._prefix(number, marked, dialect)
            if common == len(tail):
                return common, "", own if plain and plain[0][-1] == tail else ""
            without = _common(plain[0][-1], tail) if plain else 0
            if shared := self._shared(before[common:], tail[common:]):  # white space differs
                return common + shared, "", ""
            if common > without or without == len(tail):  # some templates write the generation prompt always
                return common, tail[common:], ""
            if plain and common == len(plain[0][-1]) and not self.special.search(before[common:]):
                return common, tail[common:], ""  # the turn goes on after a tool's result (Gemma 4)
        # The turn is the first, or the one before it is rendered differently: by what an ordinary prompt ends with.
        for content in (OTHER, [{"type": "text", "text": OTHER}]):
            try:
                text = self.text({"messages": [{"role": "user", "content": content}]}, Dialect(), prompt=True)
            except Refusal:
                continue
            tail = text.rpartition(OTHER)[2]
            suffixes = (tail[start:] for start in range(len(tail)))
            if any(before.endswith(suffix) for suffix in suffixes if len(suffix.strip()) > 2):
                return len(before), "", ""
        raise Refusal("it does not begin the assistant's turn as its generation prompt does")

    def _shared(self, before: str, prompt: str) -> int:
        """How much of the text before a turn reaches up to the last special token that the prompt has too."""
        ends = 0
        for found in self.special.finditer(prompt):
            at = before.rfind(found[0])
            if at >= 0:
                end = at + len(found[0])
                ends = max(ends, end + _common(before[end:], prompt[found.end() :]))
        return ends

    def _common(self, text: str, other: str) -> int:
        """How many characters two texts have in common at their beginning; tokens and tags count whole."""
        common = _common(text, other)
        inside = (found for form in (self.special, TAG) for found in form.finditer(text))
        return min((found.start() for found in inside if found.start() < common < found.end()), default=common)

    def _prefix(
        self, count: int, marked: Example, dialect: Dialect, prompt: bool = False
    ) -> tuple[list[str], list[int]] | None:
        """The first messages as the template renders them alone; None where it refuses them."""
        try:
            return parts(self.text({**marked, "messages": marked["messages"][:count]}, dialect, prompt))
        except Refusal:
            return None

    def _end(
        self, number: int, after: str, alone: tuple[list[str], list[int]] | None, marked: Example, dialect: Dialect
    ) -> tuple[int, str, str]:
        """How many characters after a turn's last text are trained; the token that ends it; what must be appended.

        What closes a turn stands there both at the end of a conversation and before another turn:
        Phi-3's `<|endoftext|>` closes the conversation, and what opens the next turn is that turn's.
        """
        message = marked["messages"][number]
        is_last = number + 1 == len(marked["messages"])
        other = after
        if is_last:
            longer = [*marked["messages"], {"role": "user", "content": OTHER}]
            if calls := message.get("tool_calls"):
                answers = {"tool_call_id": calls[0].get("id", ""), "name": calls[0]["function"]["name"]}
                longer[-1] = {"role": "tool", "content": OTHER, **answers}
            try:
                text = self.text({**marked, "messages": longer}, dialect).rpartition(OTHER)[0]
                other = parts(text)[0][-1] or after
            except Refusal:
                pass
        elif alone is not None:
            other = alone[0][-1]
        common = after[: _common(after, other)]
        # A turn may follow always (Cohere's).
        follows = next((m.start() for m in self.special.finditer(common) if STARTS.search(m[0])), len(common))
        found = list(self.special.finditer(common[:follows]))
        ends = found[-1].end() if found else 0
        later = self.special.search(after, ends)
        if found and not common[ends : later.start() if later else follows].strip():
            return ends, found[-1][0], ""
        # gpt-oss ends earlier turns by another token than the last one; GLM's end by what opens the next.
        if later and not STARTS.search(later[0]):
            return later.end(), later[0], ""
        if is_last and (later := self.special.search(other)) and not STARTS.search(later[0]):
            return len(after), later[0], later[0]
        return len(common[:follows].rstrip()), "", ""


def _stands(text: str, written: str) -> bool:
    return any(form in written for form in json_forms(text))


def _common(text: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(other)))


def _loss(layout: TemplateLayout) -> tuple[int, bool]:
    return len(layout.lost) + len(layout.lost_tools) + len(layout.lost_keys), layout.changed


def _lost_tools(marked: Example, literals: str) -> list[str]:
    """Names, parameters and descriptions of tools that do not stand in the text."""
    texts: list[str] = []
    for tool in marked.get("tools") or ():
        function = tool.get("function", tool)
        if isinstance(function, dict):
            texts += [function[key] for key in ("name", "description") if isinstance(function.get(key), str)]
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            texts += map(str, properties if isinstance(properties, dict) else ())
    return [text for text in texts if not _stands(text, literals)]
