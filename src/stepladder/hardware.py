"""What a GPU can do, by the name that its driver gives: dense bf16 peak, memory, memory bandwidth."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A row of the table.

    `tflops` is the dense matrix rate in bf16 (fp16 where it has no bf16) with fp32 sums, at the boost
    clock; data sheets often print twice that, which holds for sparse weights. `memory_gib` is what the
    driver reports, rounded down, and `bandwidth` is in GB/s.
    """

    pattern: str
    tflops: float
    memory_gib: int
    bandwidth: int
    source: str


# The first pattern found in the name counts, so variants stand before the plain name.
GPUS = (
    GPU(r"B200", 2250, 178, 8000, "NVIDIA HGX B200 data sheet"),
    GPU(r"GH200", 989, 94, 4000, "NVIDIA GH200 data sheet"),
    GPU(r"H200", 989, 139, 4800, "NVIDIA H200 data sheet"),
    GPU(r"H100 NVL", 835, 93, 3900, "NVIDIA H100 data sheet"),
    GPU(r"H100 PCIe", 756, 79, 2000, "NVIDIA H100 data sheet"),
    GPU(r"H100", 989, 79, 3350, "NVIDIA H100 data sheet"),
    GPU(r"A100.*80GB", 312, 79, 2039, "NVIDIA A100 data sheet"),
    GPU(r"A100", 312, 39, 1555, "NVIDIA A100 data sheet"),
    GPU(r"A40\b", 149.7, 44, 696, "NVIDIA A40 data sheet"),
    GPU(r"A10\b", 125, 22, 600, "NVIDIA A10 data sheet"),
    GPU(r"L40S", 362, 44, 864, "NVIDIA L40S data sheet"),
    GPU(r"L40\b", 181, 44, 864, "NVIDIA L40 data sheet"),
    GPU(r"L4\b", 121, 22, 300, "NVIDIA L4 data sheet"),
    GPU(r"RTX 5090", 209.5, 31, 1792, "NVIDIA RTX Blackwell white paper"),
    GPU(r"RTX 4090", 165.2, 23, 1008, "NVIDIA Ada white paper"),
    GPU(r"RTX 3090", 71, 23, 936, "NVIDIA GA102 white paper"),
    GPU(r"V100.*32GB", 125, 31, 900, "NVIDIA V100 data sheet (fp16)"),
    GPU(r"V100", 125, 15, 900, "NVIDIA V100 data sheet (fp16)"),
    GPU(r"\bT4\b", 65, 14, 320, "NVIDIA T4 data sheet (fp16)"),
    GPU(r"MI300X", 1307, 191, 5300, "AMD Instinct MI300X data sheet"),
)


def gpu(name: str) -> GPU | None:
    """The row of a device by the driver's name for it (`NVIDIA H100 80GB HBM3`); None where there is none."""
    return next((row for row in GPUS if re.search(row.pattern, name)), None)
