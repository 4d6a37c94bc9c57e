"""The loss of a model on the trained tokens of rows, row by row."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, NamedTuple

from stepladder.data.render import IGNORED, render
from stepladder.data.rows import Rows
from stepladder.evaluation.generation import parallel_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RowLoss(NamedTuple):
    """The negative log-likelihood of a row's trained tokens (nats, summed), and how many they are."""

    nats: float
    tokens: int


def of_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, batch_size: int = 8
) -> list[RowLoss]:
    """The loss of each row, in their order; the ranks share them out.

    Raises:
        ModelError: conversations and a tokenizer without a chat template.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    items = render(rows, tokenizer).remove_columns("rows").to_list()
    # Rows of like length together: less padding. Their order is restored at the end.
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters

    def batch_of(numbers: list[int]) -> list[RowLoss]:
        def padded(column: str, value: int) -> torch.Tensor:
            cells = [torch.tensor(items[i][column]) for i in numbers]
            return pad_sequence(cells, batch_first=True, padding_value=value).to(model.device)

        # Without a mask: what a token sees lies before it, and the padding behind.
        ids, labels = padded("input_ids", tokenizer.pad_token_id), padded("labels", IGNORED)[:, 1:]
        # The prompts' scores are not asked for: with 150,000 words they would take most of the memory.
        trained = (labels != IGNORED).any(0).tolist()
        labels = labels[:, trained.index(True) if any(trained) else 0 :]
        scored = {"logits_to_keep": labels.shape[1] + 1} if keeps else {}
        with torch.inference_mode():
            logits = model(ids, **scored).logits
        found = []
        # Counted from the end: before the first token there may be virtual ones.
        for row, targets in zip(logits[:, -1 - labels.shape[1] : -1], labels, strict=True):
            own = targets != IGNORED
            nats = torch.nn.functional.cross_entropy(row[own].float(), targets[own], reduction="sum")
            found.append(RowLoss(nats.item(), int(own.sum())))
        return found

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    losses = dict(zip(order, (loss for batch in parallel_map(batches, batch_of) for loss in batch), strict=True))
    return [losses[i] for i in range(len(items))]


def mean(losses: list[RowLoss], of: list[RowLoss] | None = None) -> float:
    """Nats a token: every token counts once, whatever its row's length.

    `of` are the losses of another model on the same rows, whose tokens are the unit: two models with
    tokenizers of their own cut the same text into different numbers of tokens.
    """
    return sum(loss.nats for loss in losses) / sum(loss.tokens for loss in of or losses)
