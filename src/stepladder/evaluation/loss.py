"""The loss of a model on the trained tokens of rows, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stepladder.data.render import IGNORED, render
from stepladder.data.rows import Rows
from stepladder.evaluation import shared_out

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
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    items = render(rows, tokenizer).remove_columns("rows").to_list()
    # Rows of like length together: less padding. Their order is restored at the end.
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]))

    def batch_of(numbers: list[int]) -> list[RowLoss]:
        batch = {k: v.to(model.device) for k, v in collate([items[i] for i in numbers]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**batch).logits[:, -1 - labels.shape[1] : -1]  # after virtual tokens, where there are any
        found = []
        for row, targets in zip(logits, labels, strict=True):
            trained = targets != IGNORED
            nats = torch.nn.functional.cross_entropy(row[trained].float(), targets[trained], reduction="sum")
            found.append(RowLoss(nats.item(), int(trained.sum())))
        return found

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    losses = dict(zip(order, (loss for batch in shared_out.each(batches, batch_of) for loss in batch), strict=True))
    return [losses[i] for i in range(len(items))]


def mean(losses: list[RowLoss], of: list[RowLoss] | None = None) -> float:
    """Nats a token: every token counts once, whatever its row's length.

    `of` are the losses of another model on the same rows, whose tokens are the unit: two models with
    tokenizers of their own cut the same text into different numbers of tokens.
    """
    return sum(loss.nats for loss in losses) / sum(loss.tokens for loss in of or losses)
