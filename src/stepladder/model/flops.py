"""The floating-point operations of training: a run's MFU and a plan's speed are computed from them.

A matrix product of m×k by k×n takes 2 m k n operations, a multiplication and an addition each.

Weights: per token a matrix takes 2 operations per parameter forward. Backward it takes as many for the gradient of its
input, and as many again for its own gradient if it is trained. Full fine-tuning thus takes 6 N per token (Kaplan et
al. 2020, arXiv:2001.08361, table 1: 2 N forward, twice that backward). With LoRA the frozen N take 4, since the
gradient still passes through them to the adapters below. Norms and biases count as if they were matrices, which is
below 0.1 % of N.

Attention: a head compares a query with a key (q·k, 2 d operations) and adds the weighted value (2 d): 4 operations per
query–key pair and dimension, over heads × head dimension, which need not be the hidden size (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B). Backward it is two products for each of the two: the gradients of the probabilities and
the values, of the queries and the keys. So twice the forward pass, and the same under LoRA, since attention has no
weights. PaLM counts the whole square of pairs; here the caller says how many there are, usually the causal half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of a configuration: Qwen, Mixtral, DeepSeek


@dataclass(frozen=True)
class Flops:
    """The operations of one model.

    Args:
        parameters: those that a token is multiplied with: without the experts that it does not go through, and without
            an embedding that is only looked up.
        trained: how many of them get a gradient.
        pair: operations of attention forward for one query–key pair, all layers together.
    """

    parameters: float
    trained: float
    pair: int

    def count_forward(self, tokens: float, pairs: float) -> float:
        """The operations of a forward pass over `tokens` with `pairs` query–key pairs."""
        return 2 * self.parameters * tokens + self.pair * pairs

    def count_training(self, tokens: float, pairs: float) -> float:
        """The operations of a forward and a backward pass, nothing recomputed."""
        return 2 * self.count_forward(tokens, pairs) + 2 * self.trained * tokens + self.pair * pairs


def count_flops(config: Any, parameters: float, trainable: float, full: bool) -> Flops:
    """The operations of a model.

    Args:
        config: of the language model.
        parameters: all of the model's parameters, an adapter's included; packed ones count unpacked.
        trainable: those that are trained.
        full: whether the model's own weights are trained, not an adapter.
    """
    multiplied = parameters - _count_looked_up(config) - _count_idle(config)
    return Flops(multiplied, multiplied if full else trainable, _count_pair(config))


def count_experts(config: Any) -> int:
    """The routed experts of a layer; 0 for a model whose tokens all go through the same weights."""
    return next((experts for key in EXPERTS if (experts := getattr(config, key, None))), 0)


def _count_pair(config: Any) -> int:
    """Operations forward for one query–key pair, all layers; 0 for a model without attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # DeepSeek's latent attention: `head_dim` is there that of the rotated part of a key alone.
    key, value = (getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
    return 2 * (key + value) * heads * config.num_hidden_layers


def _count_looked_up(config: Any) -> int:
    """The parameters of the input embedding, unless it is the output layer too."""
    return 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size


def _count_idle(config: Any) -> int:
    """The parameters of the experts that a token does not go through, of three matrices each."""
    experts, used = count_experts(config), getattr(config, "num_experts_per_tok", None)
    if not experts or not used:
        return 0
    kinds = getattr(config, "mlp_layer_types", None)
    dense = kinds.count("dense") if kinds else getattr(config, "first_k_dense_replace", None) or 0
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return (config.num_hidden_layers - dense) * (experts - used) * 3 * config.hidden_size * width
