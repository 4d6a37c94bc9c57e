"""A few held-out questions, asked before and after the training: what a tracker shows beside the curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stepladder import hardware
from stepladder.data.rows import Rows
from stepladder.errors import StepladderError
from stepladder.evaluation import questions
from stepladder.evaluation.generate import answers, prompt_text
from stepladder.evaluation.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT, TRIED = 3, 30  # questions, and rows that are tried for them
LENGTH = 64  # tokens of an answer: seconds, not minutes


def asker(
    rows: Any, tokenizer: PreTrainedTokenizerBase, strategy: str, precision: str
) -> Callable[[Any], list[dict[str, str]]] | None:
    """What asks a model the first questions of `rows` that the chat template renders.

    None where there are none, or the strategy shards the weights: only rank 0 asks, and has a part of them.
    """
    if not isinstance(rows, Rows) or strategy.startswith(("zero3", "fsdp")):
        return None
    first = questions.of_rows(rows.take(range(min(TRIED, len(rows)))))
    asked = [question for question in first if _can_be_asked(question, tokenizer)][:COUNT]

    def ask(model: Any) -> list[dict[str, str]]:
        import torch

        trains, caches = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        low = hardware.dtype_of(precision)
        asked_of = [question.example for question in asked]
        try:
            with torch.autocast(model.device.type, low, enabled=low != torch.float32):  # as it trains
                said = answers(model, tokenizer, asked_of, shared=False, max_new_tokens=LENGTH)
        finally:
            model.train(trains)
            model.config.use_cache = caches
        return [
            {"question": question.text, "reference": question.reference, "answer": answer.text}
            for question, answer in zip(asked, said, strict=True)
        ]

    return ask if asked else None


def _can_be_asked(question: Question, tokenizer: PreTrainedTokenizerBase) -> bool:
    """False where the template refuses it: training names such rows, and `on_bad_row: skip` leaves them out."""
    try:
        prompt_text(tokenizer, question.example)
    except StepladderError:
        return False
    return True
