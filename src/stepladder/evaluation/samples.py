"""A few held-out questions, asked before and after the training: what a tracker shows beside the curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stepladder.data.rows import Rows
from stepladder.evaluation import questions
from stepladder.evaluation.generate import answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT, LENGTH = 3, 64  # questions, and tokens of an answer: seconds, not minutes


def asker(
    rows: Any, tokenizer: PreTrainedTokenizerBase, strategy: str, precision: str
) -> Callable[[Any], list[dict[str, str]]] | None:
    """What asks a model the first questions of `rows`.

    None where there are none, or the strategy shards the weights: only rank 0 asks, and has a part of them.
    """
    if not isinstance(rows, Rows) or strategy.startswith(("zero3", "fsdp")):
        return None
    asked = questions.of_rows(rows.take(range(min(COUNT, len(rows)))))

    def ask(model: Any) -> list[dict[str, str]]:
        import torch

        trains, caches = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        asked_of = [question.messages for question in asked]
        try:
            with torch.autocast(model.device.type, low, enabled=low is not None):  # as it trains
                said = answers(model, tokenizer, asked_of, shared=False, max_new_tokens=LENGTH)
        finally:
            model.train(trains)
            model.config.use_cache = caches
        return [
            {"question": question.text, "reference": question.reference, "answer": answer.text}
            for question, answer in zip(asked, said, strict=True)
        ]

    return ask if asked else None
