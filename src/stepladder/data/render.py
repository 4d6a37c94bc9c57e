"""Messages to tokens, and to labels that train the assistant's words and its end of turn, nothing else.

`templates.layout` tells where a chat template puts each text of a conversation. A row is rendered
once and must be that layout filled with its texts, so that nothing of it is lost or changed; the
trained characters follow from the layout, and the tokens are marked by their place in the text.
"""

from __future__ import annotations

import bisect
import io
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from stepladder.data.formats import Example
from stepladder.data.loss_keys import mode, reasoning_mode
from stepladder.data.row_renderer import Remarks, RowRenderer, Span, refuse_losses, template_refusal
from stepladder.data.rows import Rows, Stream
from stepladder.data.special_tokens import KEY as NEW_TOKENS
from stepladder.data.templates.chat_template import THOUGHT_END, Refusal, mark
from stepladder.data.templates.layout import ChatTemplate
from stepladder.errors import DataError, ModelError, locate_errors
from stepladder.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("input_ids", "labels", "rows")
IGNORED = -100  # the label of a token that trains nothing
START, END = operator.itemgetter(0), operator.itemgetter(1)  # of a token's characters
LOOKED_AT = 20  # rows of each batch whose tokens are decoded, to see whether they are the text
ANCHORS = ("\n", "a", ".")  # a text is tokenized behind one of these where it is no text's beginning
T = TypeVar("T")
Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, and the characters of each
# What opens a question in the formats that chats are published in.
RENDERED_CHAT = re.compile(
    r"<\|im_start\|>user|<\|start_header_id\|>user|<start_of_turn>user|<\|user\|>|\[INST\]"
    r"|^### (?:Human|User|Instruction)\b|^(?:Human|User|USER): .*\n+(?:Assistant|ASSISTANT): ",
    re.MULTILINE,
)
BATCH = 1000  # rows that the Rust tokenizer takes at once, on all its threads
CHARACTERS = 250_000  # of their texts: each token takes some 300 bytes
WRITTEN = 1 << 16  # tokens that are written at once
LONG = 1_000_000  # characters from which no more of a text is tokenized than max_length needs
LONGEST = 4_000_000  # characters of a text whose tokens are all needed
MARGIN = 1000  # tokens behind max_length that are tokenized too


class Text(NamedTuple):
    """A row as text with the characters that are trained, or what is wrong with it."""

    number: int
    example: Example
    text: str
    spans: list[Span] | DataError
    is_whole: bool = True  # whether its end is there too


@dataclass
class Rendered:
    """A row as tokens: `input_ids` and `labels`, equally long; `turns` are trained, and end at the tokens `ends`.

    `thoughts` tokens of these turns have no loss (`train_on_reasoning`).
    """

    ids: list[int]
    labels: list[int]
    turns: int = 0
    ends: list[int] = field(default_factory=list)
    thoughts: int = 0
    is_whole: bool = True  # whether there are no further tokens


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
    import pyarrow
    from datasets import Dataset

    stream = io.BytesIO()
    write(stream, rows, tokenizer, settings, first, Remarks() if remarks is None else remarks)
    return Dataset.from_buffer(pyarrow.py_buffer(stream.getbuffer()))


def write(
    stream: BinaryIO,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings | None,
    first: int,
    remarks: Remarks,
) -> None:
    """Write the columns that `render` describes as an Arrow stream; no more than a batch of them is held."""
    import pyarrow

    type_ = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([(name, type_) for name in COLUMNS])
    with pyarrow.ipc.new_stream(stream, schema) as out:
        found = _within_length(rows, tokenizer, settings, remarks)
        while batch := list(_take_tokens(found)):
            columns = zip(*((row.ids, row.labels, [first + number]) for number, row in batch), strict=True)
            out.write_batch(pyarrow.record_batch([pyarrow.array(column, type_) for column in columns], schema=schema))


def _take_tokens(found: Iterator[tuple[int, Rendered]]) -> Iterator[tuple[int, Rendered]]:
    """The next rows, until they have as many tokens as a batch holds."""
    tokens = 0
    while tokens < WRITTEN and (item := next(found, None)):
        tokens += len(item[1].ids)
        yield item


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

    return {name: List(Value("int32")) for name in COLUMNS}


def _within_length(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings | None, remarks: Remarks
) -> Iterator[tuple[int, Rendered]]:
    """Rows cut to `max_length`, with their numbers; one that cannot be used is raised, or skipped and listed."""
    max_length = settings.get("max_length") if settings else None
    skips = settings is not None and settings.get("on_bad_row") == "skip"
    remarks.meant = (settings.get(NEW_TOKENS) if settings else None) or ()
    for number, row in enumerate(
        tokenize(rows, tokenizer, mode(settings), remarks, max_length, reasoning_mode(settings))
    ):
        if isinstance(row, Rendered):
            row.ids, row.labels = row.ids[:max_length], row.labels[:max_length]
            if any(label != IGNORED for label in row.labels):
                remarks.turns, remarks.thoughts = remarks.turns + row.turns, remarks.thoughts + row.thoughts
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


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    train_on: str = "all_turns",
    remarks: Remarks | None = None,
    max_length: int | None = None,
    train_on_reasoning: str = "all",
) -> Iterator[Rendered | DataError]:
    """Each row as tokens, in order and without truncation, or what is wrong with it in its stead.

    Of a text of more than `LONG` characters no more is tokenized than `max_length` needs; the row is remarked.

    Raises:
        ModelError: conversations and a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None and any("messages" in example for example in rows.examples):
        raise ModelError(
            "the model has no chat template, so a conversation cannot be rendered",
            why="base models are trained on plain text",
            help='prompt_template: "### User: {input}\\n### Assistant: ", or chat_template: chatml, or rows of text',
        )
    renderer = RowTokenizer(tokenizer, Remarks() if remarks is None else remarks, max_length, train_on_reasoning)
    texts = renderer.texts(zip(rows.examples, rows.where, strict=True))
    while batch := list(take_batch(texts, lambda row: len(row.text))):
        yield from renderer.batch(batch, train_on)


def take_batch(rows: Iterator[T], size: Callable[[T], int] = len) -> Iterator[T]:  # type: ignore[assignment]
    """The next rows, as many as are tokenized at once; `size` counts the characters of one."""
    characters = 0
    for row in itertools.islice(rows, BATCH):
        yield row
        characters += size(row)
        if characters >= CHARACTERS:
            return


class RowTokenizer(RowRenderer):
    """Rows to tokens by one tokenizer; of a very long row only those that can be within `max_length`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, remarks: Remarks, max_length: int | None, reasoning: str = "all"
    ):
        super().__init__(tokenizer, remarks, reasoning)
        self.max_length = max_length

    def texts(self, rows: Iterable[tuple[Example, str]]) -> Iterator[Text]:
        """Each row as its template renders it, as far as its tokens can be within `max_length`."""
        for self.number, (example, where) in enumerate(rows):
            try:
                with locate_errors(where):
                    text, spans = self.conversation(example) if "messages" in example else (example["text"], [])
                    whole, text = len(text), self._head(text)
                yield Text(self.number, example, text, spans, is_whole=len(text) == whole)
            except DataError as error:
                yield Text(self.number, example, "", error)

    def _head(self, text: str) -> str:
        """Of a very long text the part that gives `max_length` tokens: its own are the same as those of the whole.

        A tokenizer's choice depends on the characters around it, not on those a thousand tokens on.

        Raises:
            DataError: the text is too long to be tokenized as a whole, and no part of it is enough.
        """
        if len(text) <= LONG:
            return text
        if self.max_length is not None:
            head = text[: LONG + 8 * self.max_length]
            ids = self.tokenizer(head, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            if len(head) < len(text) and len(ids) > self.max_length + MARGIN:
                self.remark("long_text")
                return head
        if len(text) > LONGEST:
            raise DataError(
                f"the row is a text of {len(text):,} characters, too long to be one sequence of tokens",
                why="max_length is null, so that all of it would be tokenized" * (not self.max_length),
                help="a max_length, or " * (not self.max_length)
                + "split it into several rows, or remove it; or on_bad_row: skip",
            )
        return text

    def batch(self, rows: list[Text], train_on: str) -> Iterator[Rendered | DataError]:
        encoded = self.tokenizer(
            [row.text for row in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        ids_of, offsets_of = encoded["input_ids"], encoded["offset_mapping"]
        for number, (self.number, example, text, spans, is_whole) in enumerate(rows):
            ids, offsets = ids_of[number], offsets_of[number]
            if isinstance(spans, DataError):
                yield spans
            elif "messages" not in example:
                if chat := RENDERED_CHAT.search(example["text"]):
                    self.remark("rendered_text", chat[0].strip())
                if self.reasoning != "all" and THOUGHT_END in example["text"]:
                    self.remark("thought_in_text")
                ids = self._add_begin_and_end(ids)
                yield Rendered(ids, list(ids), is_whole=is_whole)
            else:
                cuts = [span.start for span in spans] + [span.end for span in spans if not span.ends]
                ids, offsets = self._tokenize_apart(text, sorted(cuts), (ids, offsets))
                if number < LOOKED_AT and _letters(self.tokenizer.decode(ids)) != _letters(text):
                    self.remark("changed_by_tokenizer")
                if self.unknown in ids and str(self.tokenizer.unk_token) not in text:
                    self.remark("changed_by_tokenizer")
                if self.begin and ids[: len(self.begin)] != self.begin:
                    self.remark("no_beginning", self.tokenizer.decode(self.begin))
                rendered = _labelled(ids, offsets, spans, train_on)
                rendered.is_whole = is_whole
                yield rendered

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
    labels, ends, thoughts = [IGNORED] * len(ids), [], 0
    for span in spans:
        first, last = (bisect.bisect_left(offsets, place, key=START) for place in (span.start, span.end))
        if first and offsets[first - 1][1] > span.start:
            first -= 1
        labels[first:last] = ids[first:last]
        for begin, end in span.thoughts:
            # Of the tokens that reach over an edge, one with characters of the answer has a loss.
            a, b = (max(first, bisect.bisect_right(offsets, place, hi=last, key=END)) for place in (begin, end))
            thoughts += sum(label != IGNORED for label in labels[a:b])
            labels[a:b] = [IGNORED] * (b - a)
        if span.ends and last:
            ends.append(last - 1)
    return Rendered(ids, list(ids) if train_on == "everything" else labels, len(spans), ends, thoughts)


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
