"""Messages to tokens, and to labels that train the assistant's words and its end of turn, nothing else.

The mask comes from the template itself: by its `{% generation %}` markers where it has them
(or where TRL ships a marked version of it), else by rendering the conversation turn by turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepladder.data.mixture import Rows
from stepladder.errors import DataError, ModelError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that trains nothing


def render(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Tokenize rows into `input_ids` and `labels` (lists of int, equally long, at most `max_length`).

    `row` is the position of the row in `rows`, by which a training step can be traced back.

    Raises:
        DataError: a row that trains nothing within `max_length`.
        ModelError: conversations and a tokenizer without a chat template.
    """
    from datasets import Dataset

    template = training_template(tokenizer) if any("messages" in e for e in rows.examples) else None
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "row": []}
    for number, (example, where) in enumerate(zip(rows.examples, rows.where, strict=True)):
        if "messages" in example:
            ids, labels = render_conversation(example["messages"], tokenizer, template, where)
        else:
            ids = tokenizer(example["text"])["input_ids"]
            if ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
            labels = list(ids)
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels):
            raise DataError(
                "nothing of this row is trained",
                where=where,
                why=f"its first {max_length} tokens hold no word of the assistant's" if max_length else "",
                way_out="raise max_length, shorten the question, or remove the row",
            )
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["row"].append(number)
    return Dataset.from_dict(columns)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with generation markers that renders as the tokenizer's own does, or None.

    Raises:
        ModelError: the tokenizer has no chat template at all.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if tokenizer.chat_template is None:
        raise ModelError(
            "the model has no chat template, so a conversation cannot be rendered",
            why="base models are trained on plain text",
            way_out="use the instruct version of the model, or rows with a 'text' column",
        )
    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # TRL knows no marked version of this template: the turns are rendered one by one
        return None


def render_conversation(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str | None, where: str = ""
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels.

    Raises:
        DataError: the template refuses the conversation, or renders its beginning differently
            when more turns follow, so that the trained tokens cannot be told.
    """
    try:
        if template is not None:
            done = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = done["input_ids"], done["assistant_masks"]
            return ids, [i if trained else IGNORED for i, trained in zip(ids, mask, strict=True)]
        return _render_by_turns(messages, tokenizer, where)
    except DataError:
        raise
    except Exception as error:  # Jinja's errors, raised by the template's own checks
        raise DataError(
            f"the model's chat template refuses this conversation: {error}",
            where=where,
            way_out="roles must follow one another as the template wants (user, assistant, …)",
        ) from None


def _render_by_turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    """An assistant turn is what the template adds between the prompt for it and its end."""

    def tokens(upto: int, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=prompt, return_dict=True)[
            "input_ids"
        ]

    ids = tokens(len(messages), prompt=False)
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = tokens(number, prompt=True), tokens(number + 1, prompt=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                "the chat template renders this conversation's turns differently when more follow",
                where=where,
                way_out="a template with {% generation %} markers (chat_template_path), or single-turn rows",
            )
        labels[len(before) : len(after)] = _upto_end_of_turn(after[len(before) :], tokenizer)
    return ids, labels


def _upto_end_of_turn(turn: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-turn token is the last one trained: a line break after it is the template's, not the model's."""
    special = set(tokenizer.all_special_ids)
    last = max((i for i, token in enumerate(turn) if token in special), default=len(turn) - 1)
    return turn[: last + 1] + [IGNORED] * (len(turn) - last - 1)
