"""Attention of one layer on a CPU, forward and backward: a padded batch, and rows by themselves.

    python benchmarks/attention.py

Eight rows of the lengths that a step of TechCo's has, in SmolLM2-135M's shape: 9 heads of 64, 3 of them for keys and
values. By turns; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from stepladder.model.cpu_kernels import ShortRows

HEADS, GROUPS, SIZE, REPEAT = 9, 3, 64, 30
LENGTHS = [175, 150, 140, 140, 137, 130, 120, 102]


def states(rows: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value [rows, heads, tokens, size], as a model's layers hand them on."""
    made = (torch.randn(rows, tokens, heads, SIZE, dtype=dtype).transpose(1, 2) for heads in (HEADS, GROUPS, GROUPS))
    return [tensor.requires_grad_() for tensor in made]


def padded() -> Callable[[], torch.Tensor]:
    longest = max(LENGTHS)
    query, key, value = states(len(LENGTHS), longest, torch.bfloat16)
    real = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    mask = real[:, None, None] & torch.ones(longest, longest, dtype=torch.bool).tril()

    def whole(tensor: torch.Tensor) -> torch.Tensor:  # with a mask, Transformers repeats the groups
        return tensor.repeat_interleave(HEADS // GROUPS, dim=1)

    return lambda: scaled_dot_product_attention(query, whole(key), whole(value), attn_mask=mask)


def by_row(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    whole = states(1, sum(LENGTHS), torch.bfloat16)

    def run() -> torch.Tensor:
        rows = zip(*(tensor.to(dtype).split(LENGTHS, dim=2) for tensor in whole), strict=True)
        out = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in rows]
        return torch.cat(out, dim=2).to(torch.bfloat16)

    return run


def products() -> Callable[[], torch.Tensor]:
    whole = states(1, sum(LENGTHS), torch.bfloat16)
    return lambda: ShortRows.apply(*whole, LENGTHS, SIZE**-0.5)


def main() -> None:
    torch.manual_seed(0)
    ways = {
        "padded, bf16": padded(),
        "by row, bf16": by_row(torch.bfloat16),
        "by row, fp32": by_row(torch.float32),
        "by row, products in bf16 (`cpu_kernels.py`)": products(),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEAT):
        for name, run in ways.items():
            began = time.perf_counter()
            out = run().sum()
            forward = time.perf_counter()
            out.backward()
            found[name].append((forward - began, time.perf_counter() - forward))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds\n")
    print("| | forward | backward | together, × padded |\n| --- | ---: | ---: | ---: |")
    medians = {
        name: [1e3 * statistics.median(times) for times in zip(*runs, strict=True)] for name, runs in found.items()
    }
    for name, (forward, backward) in medians.items():
        share = (forward + backward) / sum(medians["padded, bf16"])
        print(f"| {name} | {forward:.1f} | {backward:.1f} | {share:.2f} |")


if __name__ == "__main__":
    main()
