"""Base against tuned: the held-out loss of both, and their answers side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stepladder.data.mixture import Rows
from stepladder.data.render import IGNORED, render
from stepladder.evaluation.generate import answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Side:
    """What one model did: its mean loss on the answers' tokens (nats), and its own answers."""

    name: str
    loss: float
    tokens: int
    answers: list[str]


def measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    show: int,
    max_new_tokens: int = 128,
) -> Side:
    """Held-out loss over all rows, answers to the first `show` of them."""
    loss, tokens = held_out_loss(model, tokenizer, rows)
    prompts = [example["messages"][:-1] for example in rows.examples[:show]]
    return Side(name, loss, tokens, answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens))


def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, batch_size: int = 8
) -> tuple[float, int]:
    """Mean negative log-likelihood of the trained tokens (nats a token), and their number.

    Every token counts once, whatever the batch size: the sum over tokens is divided at the end.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    items = render(rows, tokenizer).remove_columns("rows").to_list()
    # Rows of like length together: less padding, and the order does not matter to a sum.
    items.sort(key=lambda item: len(item["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(items), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(items[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**batch).logits[:, :-1]
        trained = labels != IGNORED
        losses = torch.nn.functional.cross_entropy(logits[trained].float(), labels[trained], reduction="sum")
        total, count = total + losses.item(), count + int(trained.sum())
    return total / count, count


def as_json(data: str, rows: Rows, sides: list[Side]) -> str:
    """compare.json: the questions with their references and each side's answers, which the run's page shows."""
    asked = [example["messages"] for example in rows.examples[: len(sides[0].answers)]]
    facts = {
        "data": data,
        "questions": [messages[-2]["content"] for messages in asked],
        "references": [messages[-1]["content"] for messages in asked],
        "sides": [asdict(side) for side in sides],
    }
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def side_by_side(rows: Rows, sides: list[Side], width: int = 100) -> str:
    """Questions with each model's answer in columns, for a terminal."""
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True, width=width, title_justify="left")
    for side in sides:
        table.add_column(side.name, ratio=1, overflow="fold")
    for number in range(len(sides[0].answers)):
        question = rows.examples[number]["messages"][-2]["content"]
        table.add_row(*[f"Q: {question}" if i == 0 else "" for i in range(len(sides))], style="bold")
        table.add_row(*[side.answers[number] for side in sides])
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(table)
    return out.getvalue()
