"""Messages to tokens, and to labels that train the assistant's words and its end of turn, nothing else.

`templates.layout` tells where a chat template puts each text of a conversation. A row is rendered
once and must be that layout filled with its texts, so that nothing of it is lost or changed; the
trained characters follow from the layout, and the tokens are marked by their place in the text.
"""

from __future__ import annotations

import bisect
import itertools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stepladder.data.formats import Example
from stepladder.data.row_renderer import Remarks, RowRenderer, Span, refuse_losses, template_refusal
from stepladder.data.rows import Rows, Stream
from stepladder.data.templates.chat_template import Refusal, mark
from stepladder.data.templates.layout import ChatTemplate
from stepladder.errors import DataError, ModelError, locate_errors
from stepladder.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that trains nothing
START, END = operator.itemgetter(0), operator.itemgetter(1)  # of a token's characters
LOOKED_AT = 20  # rows of each batch whose tokens are decoded, to see whether they are the text
ANCHORS = ("\n", "a", ".")  # a text is tokenized behind one of these where it is no text's beginning
Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, and the characters of each
# What opens a question in the formats that chats are published in.
RENDERED_CHAT = re.compile(
    r"<\|im_start\|>user|<\|start_header_id\|>user|<start_of_turn>user|<\|user\|>|\[INST\]"
    r"|^### (?:Human|User|Instruction)\b|^(?:Human|User|USER): .*\n+(?:Assistant|ASSISTANT): ",
    re.MULTILINE,
)
BATCH = 1000  # rows that the Rust tokenizer takes at once, on all its threads


@dataclass
class Rendered:
    """A row as tokens: `input_ids` and `labels`, equally long; `turns` are trained, and end at the tokens `ends`."""

    ids: list[int]
    labels: list[int]
    turns: int = 0
    ends: list[int] = field(default_factory=list)


def render(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings | None = None,
    first: int = 0,
    remarks: Remarks | None = None,
) -> Dataset:
    """Tokenize rows into `input_ids` and `labels` (lists of int, equally long, at most `max_length`).

    `rows` holds the number of the row, counted from `first`, by which a training step can be traced back.
    `remarks` collects what a person should know, and the rows that `on_bad_row: skip` leaves out.

    Raises:
        DataError: the template refuses a row or loses a part of it, or nothing of it is trained within `max_length`.
        ModelError: conversations and a tokenizer without a chat template.
    """
    from datasets import Dataset, Features

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "rows": []}
    for number, row in _within_length(rows, tokenizer, settings, Remarks() if remarks is None else remarks):
        columns["input_ids"].append(row.ids)
        columns["labels"].append(row.labels)
        columns["rows"].append([first + number])
    return Dataset.from_dict(columns, features=Features(_features()))


def render_stream(stream: Stream, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> IterableDataset:
    """As `render`, for sets larger than memory: rows are read and tokenized when they are needed.

    It has no end: pass follows pass, each in an order of its own, so that a resumed run finds its
    place by counting rows from the beginning, as `rows` does.
    """
    from datasets import Features, IterableDataset

    def rows() -> Iterator[dict[str, Any]]:
        reading = itertools.chain.from_iterable(stream.read(epoch) for epoch in itertools.count())
        count, remarks = 0, Remarks()
        while batch := list(itertools.islice(reading, BATCH)):
            for number, row in _within_length(Rows.from_pairs(stream.name, batch), tokenizer, settings, remarks):
                stream.left_out.update(dict.fromkeys(remarks.skipped))
                yield {"input_ids": row.ids, "labels": row.labels, "rows": [count + number]}
            if len(remarks.skipped) == len(batch):
                raise none_left(stream.name, remarks)
            count += len(batch)
            remarks.skipped = []

    return IterableDataset.from_generator(rows, features=Features(_features()))


def _features() -> dict[str, Any]:
    from datasets import List, Value

    return {name: List(Value("int32")) for name in ("input_ids", "labels", "rows")}


def _within_length(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings | None, remarks: Remarks
) -> Iterator[tuple[int, Rendered]]:
    """Rows cut to `max_length`, with their numbers; one that cannot be used is raised, or skipped and listed."""
    max_length = settings.get("max_length") if settings else None
    skips = settings is not None and settings.get("on_bad_row") == "skip"
    for number, row in enumerate(tokenize(rows, tokenizer, mode(settings), remarks)):
        if isinstance(row, Rendered):
            row.ids, row.labels = row.ids[:max_length], row.labels[:max_length]
            if any(label != IGNORED for label in row.labels):
                remarks.turns += row.turns
                remarks.ends += sum(end < len(row.ids) for end in row.ends)
                yield number, row
                continue
            row = DataError(
                "nothing of this row is trained",
                where=rows.where[number],
                why=f"its first {max_length} tokens hold no word of the assistant's" if max_length else "",
                help="raise max_length, shorten the question, or remove the row; or on_bad_row: skip",
            )
        if not skips:
            raise row
        remarks.skip(row)


def none_left(name: str, remarks: Remarks) -> DataError:
    return DataError(f"no row of {name} can be used", why=f"all are left out; the first: {remarks.skipped[0]}")


def mode(settings: Settings | None) -> str:
    """`train_on`; TRL's `assistant_only_loss: false` or `completion_only_loss: false`, where set, mean everything."""
    if settings is None:
        return "all_turns"
    if any(settings.values.get(key) is False for key in ("assistant_only_loss", "completion_only_loss")):
        return "everything"
    return str(settings.get("train_on"))


def tokenize(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, train_on: str = "all_turns", remarks: Remarks | None = None
) -> Iterator[Rendered | DataError]:
    """Each row as tokens, in order and without truncation, or what is wrong with it in its stead.

    Raises:
        ModelError: conversations and a tokenizer without a chat template.
    """
    if any("messages" in example for example in rows.examples) and tokenizer.chat_template is None:
        raise ModelError(
            "the model has no chat template, so a conversation cannot be rendered",
            why="base models are trained on plain text",
            help='prompt_template: "### User: {input}\\n### Assistant: ", or chat_template: chatml, or rows of text',
        )
    renderer = RowTokenizer(tokenizer, Remarks() if remarks is None else remarks)
    for start in range(0, len(rows), BATCH):
        yield from renderer.batch(rows.examples[start : start + BATCH], rows.where[start : start + BATCH], train_on)


class RowTokenizer(RowRenderer):
    """Rows to tokens by one tokenizer."""

    def batch(self, examples: list[Example], where: list[str], train_on: str) -> Iterator[Rendered | DataError]:
        texts: list[str] = []
        spans: list[list[Span] | DataError] = []
        for example, self.where in zip(examples, where, strict=True):
            try:
                with locate_errors(self.where):
                    text, found = self.conversation(example) if "messages" in example else (example["text"], [])
                texts.append(text)
                spans.append(found)
            except DataError as error:
                texts.append("")
                spans.append(error)
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        for number, example in enumerate(examples):
            turns, self.where = spans[number], where[number]
            ids, offsets = encoded["input_ids"][number], encoded["offset_mapping"][number]
            if isinstance(turns, DataError):
                yield turns
            elif "messages" not in example:
                if chat := RENDERED_CHAT.search(example["text"]):
                    self.remark("rendered_text", chat[0].strip())
                ids = self._add_begin_and_end(ids)
                yield Rendered(ids, list(ids))
            else:
                cuts = [span.start for span in turns] + [span.end for span in turns if not span.ends]
                ids, offsets = self._tokenize_apart(texts[number], sorted(cuts), (ids, offsets))
                if number < LOOKED_AT and _letters(self.tokenizer.decode(ids)) != _letters(texts[number]):
                    self.remark("changed_by_tokenizer")
                if self.unknown in ids and str(self.tokenizer.unk_token) not in texts[number]:
                    self.remark("changed_by_tokenizer")
                if self.begin and ids[: len(self.begin)] != self.begin:
                    self.remark("no_beginning", self.tokenizer.decode(self.begin))
                yield _labelled(ids, offsets, turns, train_on)

    def _add_begin_and_end(self, ids: list[int]) -> list[int]:
        """Plain text is trained whole: it begins as the tokenizer begins every text, and ends by one end token."""
        begin = [] if ids[: len(self.begin)] == self.begin else self.begin
        last = next((token for token in reversed(ids) if self.tokenizer.decode([token]).strip()), None)
        return [*begin, *ids] if last == self.tokenizer.eos_token_id else [*begin, *ids, self.tokenizer.eos_token_id]

    def _tokenize_apart(self, text: str, cuts: list[int], whole: Encoded) -> Encoded:
        """The tokens of a text, none of which holds characters on both sides of a cut.

        The model is asked with the text before a cut, so it is trained after the tokens of that.
        """
        _, offsets = whole
        inside = [cut for cut in cuts if _is_inside(cut, offsets)]
        if not inside:
            return whole
        edges = [0, *inside, len(text)]
        parts = [self._piece(text[a:b], first=a == 0) for a, b in itertools.pairwise(edges)]
        if any(part is None for part in parts):
            self.remark("joined")
            return whole
        self.remark("parted")
        joined: Encoded = ([], [])
        for begin, part in zip(edges, parts, strict=False):
            assert part is not None
            joined[0].extend(part[0])
            joined[1].extend((a + begin, b + begin) for a, b in part[1])
        return joined

    def _piece(self, text: str, first: bool) -> Encoded | None:
        """The tokens of a piece of a text, found behind an anchor: SentencePiece puts a space before a text's first."""

        def encode(piece: str) -> Encoded:
            found = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            return list(found["input_ids"]), list(found["offset_mapping"])

        if first:
            return encode(text)
        for anchor in ANCHORS:
            alone, (ids, offsets) = encode(anchor)[0], encode(anchor + text)
            if ids[: len(alone)] == alone and all(a >= len(anchor) for a, _ in offsets[len(alone) :]):
                return ids[len(alone) :], [(a - len(anchor), b - len(anchor)) for a, b in offsets[len(alone) :]]
        return None


def _is_inside(cut: int, offsets: list[tuple[int, int]]) -> bool:
    """Whether a token begins before the cut and ends behind it."""
    after = bisect.bisect_right(offsets, cut, key=END)
    return after < len(offsets) and offsets[after][0] < cut


def _labelled(ids: list[int], offsets: list[tuple[int, int]], spans: list[Span], train_on: str) -> Rendered:
    """Labels for the tokens of the trained turns."""
    if train_on == "last_turn":
        spans = spans[-1:]
    labels, ends = [IGNORED] * len(ids), []
    for span in spans:
        first, last = (bisect.bisect_left(offsets, place, key=START) for place in (span.start, span.end))
        if first and offsets[first - 1][1] > span.start:
            first -= 1
        labels[first:last] = ids[first:last]
        if span.ends and last:
            ends.append(last - 1)
    return Rendered(ids, list(ids) if train_on == "everything" else labels, len(spans), ends)


def _letters(text: str) -> str:
    return "".join(text.split())


def prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a model is asked with: the conversation and the generation prompt, as training renders it.

    Raises:
        DataError: the template refuses the conversation, or does not render a part of it.
    """
    template = ChatTemplate(tokenizer)
    # An answer follows, as in training: how the template takes texts and tools is learnt from whole conversations.
    answered = {**example, "messages": [*example["messages"], {"role": "assistant", "content": "answer"}]}
    try:
        slots, marked = mark(answered)
        layout = template.layout(slots, marked)
        refuse_losses(layout, slots, len(example["messages"]))
        return template.text(example, layout.dialect._replace(training=False), prompt=True)
    except Refusal as error:
        raise template_refusal(error) from None
