"""What share of the hardware's peak a run uses: operations by formula, against a stated peak.

Of a token: 2 operations a parameter forward, 2 backward to the activations, and 2 more for the gradient
of each parameter that is trained. So 6 N in full fine-tuning (Kaplan et al. 2020, arXiv:2001.08361), and
4 N with LoRA, whose frozen weights get no gradient. Attention is apart: 4 operations a query–key pair
and dimension forward, twice that backward (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, which counts
the whole square of pairs; here it is the causal half, of each row by itself).

MFU counts no more than that. HFU adds the second forward pass of gradient checkpointing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from stepladder import hardware

# Rows and columns of the matrices by which a rate is measured: on a GPU the work must outlast the launch.
GEMM, GEMM_ON_GPU = 1024, 8192
# For so long: in its first tenth of a second a CPU may run both threads on one core, at half the rate, which gave
# an MFU of 111 %.
SECONDS = 0.25


@dataclass(frozen=True)
class Work:
    """Operations of one model on one kind of hardware.

    `parameters` take part in matrix products (an embedding that is only looked up does not), `trainable`
    of them get a gradient. `pair` is the operations of attention forward for one query–key pair, all
    layers. `peak` is in operations a second, all ranks together.
    """

    parameters: int
    trainable: int
    pair: int
    recomputes: bool
    peak: float
    peak_source: str

    def shares(self, tokens: int, pairs: int, seconds: float) -> tuple[float, float]:
        """MFU and HFU of so many tokens, with so many query–key pairs, in so many seconds."""
        forward = 2 * self.parameters * tokens + self.pair * pairs
        model = 2 * forward + 2 * self.trainable * tokens + self.pair * pairs
        possible = self.peak * seconds
        return model / possible, (model + self.recomputes * forward) / possible


def work(model: Any, counts: dict[str, int], args: Any, precision: str) -> Work | None:
    """The work of a model; None where the formula does not hold for it (experts, no attention)."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads or getattr(config, "num_experts_per_tok", None):
        return None
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    rate, source = peak(args.device, precision)
    return Work(
        counts["all"] - looked_up,
        counts["trainable"],
        4 * width * config.num_hidden_layers,
        args.gradient_checkpointing,
        rate * args.world_size,
        source,
    )


def peak(device: Any, precision: str) -> tuple[float, str]:
    """The peak of one device in operations a second, and where it is from: a data sheet, else measured here."""
    import torch

    if device.type == "cuda" and (row := hardware.gpu(torch.cuda.get_device_name(device))):
        return row.tflops * 1e12, f"{row.source}, dense {'bf16' if row.bf16 else 'fp16'}"
    dtype = hardware.dtype_of(precision)
    size = GEMM_ON_GPU if device.type == "cuda" else GEMM
    ones = torch.ones(size, size, dtype=dtype, device=device)  # not random: the run's generators stay as they are
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        began = time.perf_counter()
        (ones @ ones)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    source = f"the best of {SECONDS} s of {size}×{size} matrix products in {precision} at the start"
    return 2 * size**3 / min(seconds), source
