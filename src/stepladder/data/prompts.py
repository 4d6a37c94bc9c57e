"""A few prompts out of a data set, as token ids: the rows without their last answer."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from stepladder.data import formats, mixture, render
from stepladder.data.rows import examples
from stepladder.data.source import Source
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT, LENGTH = 4, 48  # prompts, and tokens of each that are kept, counted from its end
BUILT_IN = (
    "What should I check before I sign a rental contract?",
    "Write a short poem about rain.",
    "def fibonacci(n):",
    "How far is the Moon?",
)


def of_source(source: Source) -> list[formats.Example]:
    """The first rows; the rest is not read."""
    return [example for example, _ in islice(examples(source, True, []), COUNT)]


def of_recipe(settings: Settings) -> list[formats.Example]:
    """The first rows of the recipe's first data set."""
    return of_source(mixture.entries(settings)[0].source)


def built_in() -> list[formats.Example]:
    return [{"messages": [{"role": "user", "content": text}]} for text in BUILT_IN]


def token_ids(rows: list[formats.Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What the model is asked, by the tokenizer's chat template where it has one."""
    found = []
    for row in rows:
        messages = list(row.get("messages", ()))
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages and tokenizer.chat_template:
            text = render.prompt_text({**row, "messages": messages}, tokenizer)
        else:
            text = messages[-1]["content"] if messages else row["text"]
        found.append(tokenizer(text, add_special_tokens=not messages)["input_ids"][-LENGTH:])
    return found
