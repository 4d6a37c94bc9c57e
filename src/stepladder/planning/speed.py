"""About how fast a step goes: arithmetic by the peak that training reaches, and bytes by the links.

A forecast to choose by, not to promise: published runs of 1 to 8 billion parameters reach 33 to
56 % of the peak (docs/planning.md), and small models less.
"""

from __future__ import annotations

from typing import Any

from stepladder.hardware import GPU
from stepladder.planning.trace import Traced

EFFICIENCY = 0.40  # of the peak: NeMo Automodel's Llama-3-8B LoRA on an H100 reaches 0.41, torchtitan's full one 0.33
IN_FOUR_BITS = 0.78  # of LoRA's speed: torchtune's Llama-3.1-8B on a 4090, 2,413 against 3,083 tokens/s
BETWEEN_NODES = 50.0  # GB/s a GPU one way: a 400 Gb/s InfiniBand port for each
TO_HOST = 25.0  # GB/s one way: PCIe 4.0 × 16 as it is reached


def flops_a_token(traced: Traced, config: Any, full: bool) -> float:
    """Forward 2, gradients of activations 2, of weights 2 a parameter (frozen ones: none), and attention.

    Kaplan et al. 2020 (arXiv 2001.08361), table 1; attention as PaLM counts it (arXiv 2204.02311,
    appendix B), half of it for causal kernels. Checkpointing computes the forward pass twice.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    matrix = traced.whole.parameters - embedding
    forward = 2 * matrix + 2 * config.num_hidden_layers * config.hidden_size * traced.work.length
    return forward * ((3 if full else 2) + (1 if traced.work.checkpointing else 0))


def tokens_per_second(
    traced: Traced, config: Any, strategy: str, ranks: int, nodes: int, accumulation: int, device: GPU,
    full: bool, quantized: bool,
) -> float:  # fmt: skip
    """Tokens in a second over all ranks, communication hidden behind arithmetic as far as it goes."""
    tokens = traced.work.micro * traced.work.length * accumulation  # of a rank, in a step
    reached = device.tflops * 1e12 * EFFICIENCY * (IN_FOUR_BITS if quantized else 1)
    compute = tokens * flops_a_token(traced, config, full) / reached
    link = (device.link if nodes == 1 else min(device.link, BETWEEN_NODES)) * 1e9
    share = (ranks - 1) / ranks
    gradients, weights = 4 * traced.whole.trainable * share, traced.whole.computed * share
    sharded = strategy.startswith(("zero3", "fsdp"))
    # Ring all-reduce sends everything twice (a step); sharded weights are gathered forward and backward.
    moved = accumulation * (2 * weights + gradients) if sharded else 2 * gradients
    offloaded = 0.0
    if strategy.endswith("offload"):
        offloaded = accumulation * 2 * traced.whole.computed / ranks + 8 * traced.whole.trainable / ranks
    return ranks * tokens / max(compute, moved / link, offloaded / (TO_HOST * 1e9))
