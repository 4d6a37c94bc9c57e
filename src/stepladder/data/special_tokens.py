"""Tokens that a recipe or its chat template adds to a tokenizer, and what their text was tokenized to before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepladder.errors import RecipeError
from stepladder.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "additional_special_tokens"


@dataclass(frozen=True)
class NewToken:
    """A token that was not in the vocabulary.

    Attributes:
        text: as it stands in a row.
        row: its number, which is its row of the embeddings.
        pieces: the tokens that its text was before; its row begins as the mean of theirs.
    """

    text: str
    row: int
    pieces: tuple[int, ...]


def add_from_recipe(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[NewToken]:
    """Add the recipe's `additional_special_tokens` that the tokenizer lacks.

    Raises:
        RecipeError: one is an ordinary entry of the vocabulary, or cannot become a token.
    """
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    vocabulary = tokenizer.get_vocab()
    new = [token for token in settings.get(KEY) or () if token not in known]
    where = settings.where(KEY)
    if ordinary := [token for token in new if token in vocabulary]:
        raise RecipeError(
            f"{KEY}: {ordinary[0]!r} is an ordinary entry of the vocabulary",
            where=where,
            why="as a special token it would be cut out of every word and text that holds it",
            help=f"a text that stands nowhere else: <|{ordinary[0].strip()}|>",
        )
    found = _added(
        tokenizer,
        new,
        # Beside the special tokens that the tokenizer has, which Transformers would else put in their place.
        lambda: tokenizer.add_special_tokens({KEY: new}, replace_extra_special_tokens=False),
    )
    for token in found:
        alone = tokenizer(token.text, add_special_tokens=False)["input_ids"]
        if list(alone) != [token.row] or not token.pieces:
            raise RecipeError(
                f"{KEY}: the tokenizer does not read {token.text!r} as one token",
                where=where,
                why=f"it reads {tokenizer.convert_ids_to_tokens(alone)}",
                help="another text, without a token that the tokenizer has already",
            )
    return found


def add_of_template(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NewToken]:
    """Add a template's tokens that are not in the vocabulary as special tokens."""
    return _added(tokenizer, texts, lambda: tokenizer.add_tokens([*texts], special_tokens=True))


def _added(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add: Callable[[], int]) -> list[NewToken]:
    if not texts:
        return []
    pieces = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    add()
    rows = tokenizer.convert_tokens_to_ids(list(texts))
    return [NewToken(*each) for each in zip(texts, rows, pieces, strict=True)]


def hidden_in_answers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens that an answer is printed without: all but those that rows use and no template writes.

    Transformers keeps `additional_special_tokens` apart from the tokens of its own names (`extra_special_tokens`).
    """
    template = str(tokenizer.chat_template or "")
    named = [*tokenizer.special_tokens_map.values()]
    shown = {token for token in tokenizer.extra_special_tokens if token not in template and token not in named}
    return {number for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in shown}  # fmt: skip


def known_notes(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """Which of the recipe's `additional_special_tokens` the tokenizer has already; before they are added."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    has = [token for token in settings.get(KEY) or () if token in known]
    if not has:
        return []
    return [f"{settings.where(KEY)}: the tokenizer has {', '.join(has)} already: nothing is added for that"]
