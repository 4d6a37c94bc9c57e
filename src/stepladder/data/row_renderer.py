"""One conversation to its text and trained characters, by the layout of its template; and what is remarked of it."""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stepladder import files
from stepladder.data.formats import Example
from stepladder.data.readers import quote
from stepladder.data.templates.chat_template import READ, THOUGHT_END, Refusal, Slot, beginning
from stepladder.data.templates.layout import ChatTemplate, Point, TemplateLayout
from stepladder.data.templates.thoughts import find_thoughts, is_masked
from stepladder.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How the answers of other models' training data end.
FOREIGN_END = re.compile(r"(</s>|<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|<\|end\|>|<end_of_turn>|<eos>)\s*\Z")
# The keys of a message that have a meaning here, whether or not a template reads them.
HANDLED = READ | {"train", "tool_call_id"}
NAMES = {"content": "text of a message", "result": "tool's result", "name": "tool call"}
LOSS_HELP = {
    "reasoning": "a chat_template that renders reasoning (qwen3), or remove it from the row; or on_bad_row: skip",
    "content": "another chat_template, or remove the row; or on_bad_row: skip",
    "tools": "a chat_template that renders tools (qwen2_5, or that of a model trained to call them); "
    "or on_bad_row: skip",
}
REMARKS: dict[str, dict[str, Any]] = files.read_table("data/remarks.yaml")


@dataclass(frozen=True)
class Span:
    """The characters of a trained assistant turn, end excluded; `ends`: a special token closes it.

    `thoughts` are the characters in it that have no loss (`train_on_reasoning`).
    """

    start: int
    end: int
    ends: bool
    thoughts: tuple[tuple[int, int], ...] = ()


# Of a set none of whose turns trains its end within max_length: what is wrong, and what helps.
NO_END = (
    "the end-of-turn token is trained in no turn, so the model would not learn to stop",
    "raise max_length where it cuts every answer; else use a chat template that ends the answer",
)


def share_of_rows(numbers: Sequence[int], total: int) -> str:
    return f"{len(numbers):,} of {total:,} rows ({len(numbers) / total:.1%})"


@dataclass
class Remarks:
    """The numbers of rows by what is remarked of them, and the rows that were left out (`file:line: what`).

    `turns` are trained, and `ends` of them train their end of turn within `max_length`. `thoughts` are tokens of
    thoughts that have no loss (`train_on_reasoning`). `meant` are special tokens that the recipe adds for the rows.
    """

    meant: Sequence[str] = ()
    rows: dict[tuple[str, str], array[int]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    turns: int = 0
    ends: int = 0
    thoughts: int = 0

    def add(self, kind: str, row: int, detail: str = "") -> None:
        """Remark a row once under each kind; the detail of the first stands for most kinds."""
        key = (kind, detail)
        if not REMARKS[kind].get("each"):
            key = next((known for known in self.rows if known[0] == kind), key)
        numbers = self.rows.setdefault(key, array("Q"))
        if not numbers or numbers[-1] != row:
            numbers.append(row)

    def skip(self, error: DataError) -> None:
        self.skipped.append(f"{error.where}: {error.what}")

    def join(self, other: Remarks, first: int) -> None:
        """Add what was remarked of the rows that follow, from the number `first` on."""
        for (kind, detail), numbers in other.rows.items():
            for number in numbers:
                self.add(kind, first + number, detail)
        self.skipped += other.skipped
        self.turns, self.ends = self.turns + other.turns, self.ends + other.ends
        self.thoughts += other.thoughts

    def texts(self, total: int) -> list[tuple[str, str, str, array[int]]]:
        """Kind, what is remarked, what helps and the numbers of the rows, of a set of so many rows."""
        found = []
        for (kind, detail), numbers in self.rows.items():
            what, help = REMARKS[kind]["what"], REMARKS[kind]["help"]
            what = what.format(rows=share_of_rows(numbers, total), detail=repr(detail))
            found.append((kind, what, help.format(), numbers))
        return found

    def notes(self, where: Sequence[str]) -> list[str]:
        """What a run prints at its start: each remark with the first row that it concerns, by the rows' places."""
        texts = self.texts(len(where))
        notes = [f"{text}, the first at {where[numbers[0]]}: {help}" for _, text, help, numbers in texts]
        if self.skipped:
            notes.append(f"{len(self.skipped):,} rows are skipped, the first at {self.skipped[0]}")
        return notes


class RowRenderer:
    """Renders conversations by one tokenizer's template; what is learnt of the template serves all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, remarks: Remarks, reasoning: str = "all"):
        self.tokenizer, self.remarks, self.reasoning = tokenizer, remarks, reasoning
        self.template = ChatTemplate(tokenizer)
        self.begin = beginning(tokenizer)
        self.unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None

        self.number = 0  # of the row at hand

    def remark(self, kind: str, detail: str = "") -> None:
        self.remarks.add(kind, self.number, detail)

    def conversation(self, example: Example) -> tuple[str, list[Span]]:
        """A conversation as text, and the characters of its trained turns.

        Raises:
            DataError: the template refuses it, or its text does not hold all of the row as it is.
        """
        template = self.template
        try:
            slots, layout = template.row_layout(example)
            refuse_losses(layout, slots, len(example["messages"]))
            if layout.lost:  # thoughts of earlier turns
                self.remark("dropped_thoughts")
            text = template.row_text(example, layout, slots)
            # The text of a spliced layout is no rendering of the whole, so the blocks are of another text.
            has_blocks = template.marked and layout.spliced is None
            blocks = template.generated(example, layout.dialect) if has_blocks else None
        except Refusal as error:
            raise template_refusal(error) from None
        except RecursionError:
            raise template_refusal(Refusal("nested too deeply")) from None
        starts = layout.find(text, slots)
        if isinstance(starts, Slot):
            raise self._changed(starts, example, layout)
        text += next((turn.appended for turn in layout.turns if turn.appended), "")
        self._remark_row(example, slots, layout)
        spans = self._spans(text, example, layout, slots, starts)
        if blocks is not None:
            spans = self._within_blocks(text, spans, blocks)
        return text, spans

    def _spans(
        self, text: str, example: Example, layout: TemplateLayout, slots: list[Slot], starts: list[int]
    ) -> list[Span]:
        """The characters of the turns that are trained: none of a prompt's (TRL's prompt-completion form), and none
        that the data leaves out by `train: false`.
        """

        def place(point: Point) -> int:
            return starts[point.literal] + point.offset

        spans = []
        for turn in layout.turns:
            message = example["messages"][turn.message]
            if turn.message < example.get("prompt_messages", 0) or not message.get("train", True):
                continue
            start, end = place(turn.start), len(text) if turn.appended else place(turn.end)
            thoughts: list[tuple[int, int]] = []
            if is_masked(example, turn.message, self.reasoning):
                thoughts = find_thoughts(text, turn, layout, slots, starts, (start, end))
            spans.append(Span(start, end, bool(turn.ends), tuple(thoughts)))
        return spans

    def _changed(self, slot: Slot, example: Example, layout: TemplateLayout) -> DataError:
        _, again = ChatTemplate(self.tokenizer).row_layout(example)
        if again.literals != layout.literals:
            return DataError(
                "the chat template renders a conversation differently each time",
                why="it holds the time or a random choice, which the rows would be trained on",
                help="another chat_template, or a fixed value in chat_template_kwargs",
            )
        return DataError(
            f"the chat template changes the {NAMES.get(slot.kind, slot.kind)}: {quote(slot.text)}",
            why="what is trained must be what the row says",
            help=LOSS_HELP["content"],
        )

    def _within_blocks(self, text: str, spans: list[Span], blocks: list[tuple[int, int]]) -> list[Span]:
        """The trained turns as the template's own `{% generation %}` blocks have them, up to their end of turn.

        Raises:
            DataError: the blocks hold none of a turn.
        """
        found = []
        for span in spans:
            inside = [Span(max(a, span.start), min(b, span.end), b >= span.end, span.thoughts) for a, b in blocks]
            inside = [part for part in inside if part.start < part.end]
            if not inside:
                raise DataError(
                    "the template's {% generation %} blocks leave out an answer of this row",
                    why=f"outside of them: {quote(text[span.start : span.end])}",
                    help="mark every assistant turn in the template, or train: false on the message",
                )
            found += [*(Span(part.start, part.end, False, part.thoughts) for part in inside[:-1]), inside[-1]]
            edges = [span.start, *(place for part in inside for place in (part.start, part.end)), span.end]
            if any(text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)):
                self.remark("outside_blocks")
        return found

    def _remark_row(self, example: Example, slots: list[Slot], layout: TemplateLayout) -> None:
        """What a person should know of a row that is rendered in whole.

        Raises:
            DataError: a text was rendered before, or opens an assistant's turn.
        """
        for slot in slots:
            if slot.kind != "id" and (texts := [found[0] for found in self.template.special.finditer(slot.text)]):
                self._refuse_turns_in(slot, example, slots, layout)
                for text in (text for text in texts if text not in self.remarks.meant):
                    self.remark("special_tokens", text)
            is_answer = slot.kind == "content" and example["messages"][slot.message]["role"] == "assistant"
            if is_answer and any(slot.edges):
                self._remark_edges(slots.index(slot), slots, layout)
            if is_answer and (foreign := FOREIGN_END.search(slot.text, len(slot.text) - 40)):
                self.remark("foreign_end", foreign[1])
        for message in example["messages"]:
            before, end, _ = message["content"].partition(THOUGHT_END)
            if end and message["role"] == "assistant" and "<think>" not in before:
                self.remark("half_thought")
        _refuse_other_order(example["messages"], slots, layout)
        for turn in layout.turns:
            if turn.opened:
                self.remark("unopened", turn.opened)
            if turn.unasked:
                self.remark("unasked", turn.unasked)
            if not turn.ends:
                self.remark("turn_without_end")
        keys = {key for message in example["messages"] if len(message) > 2 for key in message}
        for key in keys - HANDLED:
            if not self.template.reads(key):
                self.remark("unread_key", key)
        for key in example.get("chat_template_kwargs") or ():
            if not self.template.names(key):
                self.remark("unread_argument", key)

    def _remark_edges(self, number: int, slots: list[Slot], layout: TemplateLayout) -> None:
        """White space around an answer that the template strips; an answer after a thought that nothing opens."""
        place, (left, right) = layout.order.index(number), slots[number].edges
        before, after = layout.literals[place], layout.literals[place + 1]
        # A line break after a thought is the template's as much as the row's.
        thought = (
            number and slots[number - 1].kind == "reasoning" and slots[number - 1].message == slots[number].message
        )
        if not (thought or before.endswith(left)) or not after.startswith(right):
            self.remark("trimmed")

    def _refuse_turns_in(self, slot: Slot, example: Example, slots: list[Slot], layout: TemplateLayout) -> None:
        """Raise where a text holds what the template writes before a turn: by the tokens it would be one."""
        number = slots.index(slot)
        before = layout.literals[layout.order.index(number)] if number in layout.order else ""
        own = [found[0] for found in self.template.special.finditer(before)]
        if own and slot.kind == "content" and slot.text.startswith(own[-1]):
            raise DataError(
                f"a text of this row is rendered already: {quote(slot.text)}",
                why=f"the chat template would put {own[-1]} before it once more",
                help="give the texts without the template's tokens, or the whole as a column 'text'",
            )
        for turn in layout.turns:
            header = layout.literals[turn.start.literal][: turn.start.offset]
            if found := list(self.template.special.finditer(header)):
                opens = header[found[-1].start() :].strip()
                if opens in slot.text:
                    raise DataError(
                        f"a text of this row opens an assistant's turn: {quote(slot.text)}",
                        why=f"it holds {opens!r}, with which the chat template begins an answer",
                        help="write the token otherwise, or remove the row; or on_bad_row: skip",
                    )


def _refuse_other_order(messages: list[dict[str, Any]], slots: list[Slot], layout: TemplateLayout) -> None:
    """Raise where results follow in another order than their calls, and the template renders no ids."""
    if any(slots[slot].kind == "id" for slot in layout.order):
        return
    for number, message in enumerate(messages):
        asked = [call.get("id") for call in message.get("tool_calls", ())]
        results = itertools.takewhile(lambda m: m["role"] == "tool", messages[number + 1 :])
        given = [result.get("tool_call_id") for result in results]
        if len(asked) > 1 and None not in asked + given and asked[: len(given)] != given:
            raise DataError(
                "the tools' results stand in another order than their calls",
                why="the chat template renders no ids, so a result would be taken for that of another call",
                help="results in the order of the calls",
            )


def refuse_losses(layout: TemplateLayout, slots: list[Slot], messages: int) -> None:
    """Raise for what the template does not render, but for the thoughts of earlier turns: it drops these by design."""
    last = max((turn.message for turn in layout.turns), default=messages)
    missing = [slots[number] for number in layout.lost]
    lost = [(slot.kind, slot.text) for slot in missing if slot.kind != "reasoning" or slot.message >= last]
    lost += [("argument", key) for key in layout.lost_keys]
    lost += [("tool list", text) for text in layout.lost_tools]
    if lost:
        kind, text = lost[0]
        raise DataError(
            f"the chat template does not render the {NAMES.get(kind, kind)}: {quote(text)}",
            why="it would be lost without a word",
            help=LOSS_HELP.get(kind, LOSS_HELP["tools"]),
        )


def template_refusal(error: Refusal) -> DataError:
    return DataError(
        f"the chat template refuses this conversation: {error}",
        help="what it asks for in the rows, another chat_template, or remove the row; or on_bad_row: skip",
    )
