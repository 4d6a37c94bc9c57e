"""Bytes of state that an optimizer keeps for a parameter, read from the optimizers' own code."""

from __future__ import annotations

import torch

# Numbers of the parameter's own precision for each of its own: moments, averages, a slow copy. Momentum is off by
# default where it is optional (sgd, rmsprop). Any other optimizer counts as two, like Adam; the
# low-rank ones (GaLore, APOLLO) need less.
NUMBERS = {
    "sgd": 0, "lomo": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "schedule_free_sgd": 1, "ademamix": 3, "grokadamw": 3,
}  # fmt: skip
ADAM = 2
LEAST_IN_8_BITS = 4096  # smaller ones stay in 32 bits (bitsandbytes `min_8bit_size`; torchao has it too)
SCALE = 4 / 256  # an fp32 scale for 256 values (bitsandbytes `optimizer.py`; torchao's block size)


def state_bytes(optimizer: str, parameter: torch.nn.Parameter, is_embedding: bool) -> float:
    """Bytes of state for one trained parameter.

    A paged optimizer may move them to the host, but begins on the device. Transformers' trainer keeps
    embeddings in 32 bits under bitsandbytes' 8-bit optimizers. PyTorch's own optimizers keep states in the
    precision of the weights, bitsandbytes in fp32.
    """
    name = optimizer.removeprefix("paged_")
    if name in ("adafactor", "adalomo"):
        return 4 * _factored(parameter.shape)
    numbers = NUMBERS.get(name.removesuffix("_8bit").removesuffix("_32bit").removesuffix("_bnb"), ADAM)
    torchao = name.startswith("adamw_torch_")
    small = parameter.numel() < LEAST_IN_8_BITS or (is_embedding and not torchao)
    if name.endswith("8bit") and not name.startswith("galore") and not small:
        return numbers * (1 + SCALE) * parameter.numel()
    if name.endswith("4bit") and not small:
        return numbers * (0.5 + 2 * SCALE) * parameter.numel()  # torchao: blocks of 128
    return numbers * parameter.numel() * (4 if "bnb" in optimizer or "32bit" in name else parameter.element_size())


def _factored(shape: torch.Size) -> int:
    """Adafactor's second moment: a row and a column for each matrix (Shazeer and Stern 2018, arXiv 1804.04235)."""
    if len(shape) < 2:
        return shape.numel()
    return shape[:-1].numel() + shape[:-2].numel() * shape[-1]
