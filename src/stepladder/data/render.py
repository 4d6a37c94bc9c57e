"""Messages to tokens, and to labels that train the assistant's words and its end of turn, nothing else.

`templates.layout` tells where a chat template puts each text of a conversation. A row is rendered
once and must be that layout filled with its texts, so that nothing of it is lost or changed; the
trained characters follow from the layout, and the tokens are marked by their place in the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stepladder.data.formats import Example
from stepladder.data.remarks import Remarks
from stepladder.data.row_renderer import IGNORED, Rendered, RowRenderer, refuse_losses, template_refusal
from stepladder.data.rows import Rows, Stream
from stepladder.data.templates.chat_template import Refusal, mark
from stepladder.data.templates.layout import ChatTemplate
from stepladder.errors import DataError, ModelError
from stepladder.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # rows that the Rust tokenizer takes at once, on all its threads


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
    renderer = RowRenderer(tokenizer, Remarks() if remarks is None else remarks)
    for start in range(0, len(rows), BATCH):
        yield from renderer.batch(rows.examples[start : start + BATCH], rows.where[start : start + BATCH], train_on)


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
