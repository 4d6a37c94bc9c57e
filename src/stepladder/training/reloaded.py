"""What was saved, read back into the model that was trained: it must answer as before.

Sharded strategies have saved empty and partial weights without a word (trl#4416, peft#2450); names
and shapes may be right and the values another layer's.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stepladder.errors import ModelError
from stepladder.training.checkpoint import state

ROWS = 8  # of the training set, on whose loss the check rests
# ZeRO-3 saves 16-bit weights of a model that it trained in fp32 copies: 2^-9 of a weight is rounded away.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}  # of the loss


def check(trainer: Any, folder: Path, precision: str) -> dict[str, float | int | None]:
    """Compare the loss before and after the saved weights are put back; every rank calls it, as the last thing.

    Returns:
        `tensors` read back, and the `loss` of the saved weights (nats a token); None where a row makes it no
        number with the trained ones already (`on_nan: skip` leaves such rows out of the training).

    Raises:
        ModelError: the loss is another one.
    """
    before = _loss(trainer)
    count = _put_back(trainer, folder)
    after = _loss(trainer)
    if math.isnan(before) and math.isnan(after):
        return {"tensors": count, "loss": None}
    if not abs(after - before) <= TOLERANCE[precision] * max(1.0, before):
        raise ModelError(
            f"the saved weights are not the trained ones: loss {after:.6f} on {ROWS} rows, {before:.6f} before",
            where=str(folder),
            help="resume from the last checkpoint under another strategy, which saves again",
        )
    return {"tensors": count, "loss": after}


def _put_back(trainer: Any, folder: Path) -> int:
    here = state.of(trainer)
    names = _names_in_file(trainer, here.parameters)
    left = set(here.parameters)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            # in the order of the file, which is the same on every rank: each put is collective
            for key in tensors.keys():  # noqa: SIM118
                if (name := names.get(key, key)) in left:
                    here.put_weights(name, tensors.get_tensor(key))
                    left.remove(name)
    return len(here.parameters) - len(left)


def _names_in_file(trainer: Any, parameters: dict[str, Any]) -> dict[str, str]:
    """The model's name of each of an adapter's tensors: PEFT leaves the adapter's own name out of the file."""
    from peft import PeftModel, get_peft_model_state_dict

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        return {}
    if model.active_peft_config.is_prompt_learning:  # one tensor, for which PEFT has a name of its own
        return dict.fromkeys(["prompt_embeddings"], *parameters)
    return dict(get_peft_model_state_dict(model, {name: name for name in parameters}, save_embedding_layers=False))


def _loss(trainer: Any) -> float:
    from datasets import Dataset

    rows = trainer.train_dataset
    sample = (
        rows.select(range(min(ROWS, len(rows))))
        if isinstance(rows, Dataset)
        else Dataset.from_list(list(itertools.islice(rows, ROWS)))
    )
    loader = trainer.get_eval_dataloader(sample)
    output = trainer.evaluation_loop(loader, "", prediction_loss_only=True, metric_key_prefix="saved")
    return float(output.metrics["saved_loss"])
