"""Messages to tokens, and to labels that train the assistant's words and its end of turn, nothing else.

The mask comes from the template itself. An assistant turn is the text that the template adds
between the prompt for it and its end, so the conversation is rendered turn by turn, and the
tokens of the whole are marked by their place in the text. Templates that render a turn
differently when more follow (Qwen3 drops old thoughts) are marked by the `{% generation %}` of
the version that TRL ships for training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stepladder.data.rows import Rows
from stepladder.data.stream import Stream
from stepladder.errors import DataError, ModelError
from stepladder.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that trains nothing
BATCH = 1000  # rows that the Rust tokenizer takes at once, on all its threads

Span = tuple[int, int]  # characters of a text, end excluded
Tokens = tuple[list[int], list[int]]  # input_ids and labels, equally long


def render(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings | None = None, first: int = 0) -> Dataset:
    """Tokenize rows into `input_ids` and `labels` (lists of int, equally long, at most `max_length`).

    `rows` holds the number of the row, counted from `first`, by which a training step can be traced back.

    Raises:
        DataError: the template refuses a row, or nothing of it is trained within `max_length`.
        ModelError: conversations and a tokenizer without a chat template.
    """
    from datasets import Dataset, Features

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "rows": []}
    for number, (ids, labels) in enumerate(_cut(rows, tokenizer, settings), first):
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["rows"].append([number])
    return Dataset.from_dict(columns, features=Features(_features()))


def render_stream(stream: Stream, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> IterableDataset:
    """As `render`, for sets larger than memory: rows are read and tokenized when they are needed.

    It has no end: pass follows pass, each in an order of its own, so that a resumed run finds its
    place by counting rows from the beginning, as `rows` does.
    """
    from datasets import Features, IterableDataset

    def rows() -> Iterator[dict[str, Any]]:
        reading = itertools.chain.from_iterable(stream.read(epoch) for epoch in itertools.count())
        number = 0
        while batch := list(itertools.islice(reading, BATCH)):
            held = Rows(stream.name, [example for example, _ in batch], [where for _, where in batch])
            for ids, labels in _cut(held, tokenizer, settings):
                yield {"input_ids": ids, "labels": labels, "rows": [number]}
                number += 1

    return IterableDataset.from_generator(rows, features=Features(_features()))


def _features() -> dict[str, Any]:
    from datasets import List, Value

    return {name: List(Value("int32")) for name in ("input_ids", "labels", "rows")}


def _cut(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: Settings | None) -> Iterator[Tokens]:
    """Tokens and labels within `max_length`; a row of which nothing is trained is refused."""
    max_length = settings.get("max_length") if settings else None
    for number, (ids, labels) in enumerate(tokenize(rows, tokenizer, mode(settings))):
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels):
            raise DataError(
                "nothing of this row is trained",
                where=rows.where[number],
                why=f"its first {max_length} tokens hold no word of the assistant's" if max_length else "",
                way_out="raise max_length, shorten the question, or remove the row",
            )
        yield ids, labels


def mode(settings: Settings | None) -> str:
    """`train_on`; TRL's `assistant_only_loss: false` or `completion_only_loss: false`, where set, mean everything."""
    if settings is None:
        return "all_turns"
    if any(settings.values.get(key) is False for key in ("assistant_only_loss", "completion_only_loss")):
        return "everything"
    return str(settings.get("train_on"))


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, train_on: str = "all_turns") -> Iterator[Tokens]:
    """Token ids and labels of each row, in order, without truncation."""
    if any("messages" in example for example in rows.examples) and tokenizer.chat_template is None:
        raise ModelError(
            "the model has no chat template, so a conversation cannot be rendered",
            why="base models are trained on plain text",
            way_out='prompt_template: "### User: {input}\\n### Assistant: ", or chat_template: chatml, or rows of text',
        )
    stops = end_of_turn(tokenizer)
    for start in range(0, len(rows), BATCH):
        examples, where = rows.examples[start : start + BATCH], rows.where[start : start + BATCH]
        texts: list[str] = []
        spans: list[list[Span] | None] = []
        for example, place in zip(examples, where, strict=True):
            text, found = _text_and_spans(example, tokenizer, place)
            texts.append(text)
            spans.append(found)
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        for example, place, ids, offsets, found in zip(
            examples, where, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            if "messages" not in example:
                ids = _whole(example["text"], tokenizer)
                yield ids, list(ids)
                continue
            if found is None:
                ids, turns = _by_markers(example, tokenizer, place)
            else:
                turns = [_tokens_in(span, offsets) for span in found]
            taught = [turn for turn, is_taught in zip(turns, _taught(example), strict=False) if is_taught]
            yield ids, _labels(ids, taught, stops, train_on)


def _taught(example: dict[str, Any]) -> list[bool]:
    """Which assistant turns are trained: none of a prompt's (TRL's prompt-completion form), and
    none that the data marks by `train: false` or `weight: 0`.
    """
    first = example.get("prompt_messages", 0)
    return [
        number >= first and message.get("train", True) is not False and message.get("weight", 1) != 0
        for number, message in enumerate(example["messages"])
        if message["role"] == "assistant"
    ]


def _whole(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text is trained whole, and ends by the end token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _text_and_spans(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[Span] | None]:
    """The rendered conversation and the characters of each assistant turn; None where turns cannot be told so."""
    if "messages" not in example:
        return "", []
    messages, tools = example["messages"], example.get("tools")

    def text_of(upto: int, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto], tools=tools, tokenize=False, add_generation_prompt=prompt, continue_final_message=False
            )
        )

    try:
        text = text_of(len(messages), prompt=False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = text_of(number, prompt=True)
                after = text if number + 1 == len(messages) else text_of(number + 1, prompt=False)
                if not (text.startswith(before) and text.startswith(after)):
                    return text, None
                spans.append((len(before), len(after)))
        return text, spans
    except Exception as error:  # Jinja's errors, raised by the template's own checks
        raise DataError(
            f"the model's chat template refuses this conversation: {error}",
            where=where,
            way_out="roles must follow one another as the template wants (user, assistant, …)",
        ) from None


def _tokens_in(span: Span, offsets: list[Span]) -> range:
    """The tokens that hold characters of a span; byte-level tokenizers give some tokens no width."""
    first, last = span
    inside = [i for i, (a, b) in enumerate(offsets) if (b > first and a < last) or (a == b and first <= a < last)]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def _by_markers(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[range]]:
    """Turns from the `{% generation %}` markers of the template, or of TRL's marked version of it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    try:
        if not has_generation_markers(template):
            template = get_training_chat_template(tokenizer)
        done = tokenizer.apply_chat_template(
            example["messages"],
            tools=example.get("tools"),
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:
        raise DataError(
            "the chat template renders this conversation's turns differently when more follow",
            where=where,
            why=f"and TRL ships no marked version of it ({error})",
            way_out="a template with {% generation %} markers (chat_template_path), or single-turn rows",
        ) from None
    ids, mask = list(done["input_ids"]), [*done["assistant_masks"], 0]
    edges = [i for i in range(len(mask)) if mask[i] != (mask[i - 1] if i else 0)]
    return ids, [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _labels(ids: list[int], turns: list[range], stops: set[int], train_on: str) -> list[int]:
    """Labels for the turns that are trained, each up to its end-of-turn token.

    What a template puts after that token (a line break) is the template's, not the model's.
    """
    if train_on == "everything":
        return list(ids)
    labels = [IGNORED] * len(ids)
    for turn in turns[-1:] if train_on == "last_turn" else turns:
        end = min((i for i in turn if ids[i] in stops), default=turn.stop - 1)
        labels[turn.start : end + 1] = ids[turn.start : end + 1]
    return labels


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token that ends an answer: the first special one that the template puts after it.

    Only the first: Phi-3's template closes the conversation by a second, which the model is
    never asked for.
    """
    if tokenizer.chat_template is None:
        return {tokenizer.eos_token_id}
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = str(tokenizer.apply_chat_template(probe, tokenize=False))
    after = tokenizer(text[text.rindex("answer") + len("answer") :], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    return set([token for token in after if token in special][:1])
