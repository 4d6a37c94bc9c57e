"""SFTTrainer with the few differences that the promises need."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer


class Trainer(SFTTrainer):
    """TRL's trainer on rows that are tokenized already, with the adapter in fp32.

    TRL casts the adapter of a quantized model to bf16 (`sft_trainer.py`, after
    `_is_quantized_model`), where small updates round to nothing, and ZeRO keeps an fp32 copy of
    it while DDP and FSDP do not, so that their curves part by 1e-3. It is put back here.
    """

    def __init__(self, model: Any, **kwargs: Any):
        adapter = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        super().__init__(model=model, **kwargs)
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            for name, parameter in model.named_parameters():
                if name in adapter:
                    parameter.data = adapter[name].to(torch.float32)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card at every checkpoint: one is written at the end, from what the run has shown."""
