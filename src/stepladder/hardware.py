"""What a GPU can do: dense 16-bit peak, memory, links; by the driver's name or the short one that a person types.

And what this process computes in and has held.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # PyTorch's name of each precision


@dataclass(frozen=True)
class GPU:
    """A row of the table.

    `tflops` is the dense matrix rate in bf16 (fp16 where it has no bf16) with fp32 sums, at the boost clock; data
    sheets often print twice that, which holds for sparse weights. `memory` is in GiB as the driver reports it, `link`
    to the next GPU of a node in GB/s one way (NVLink, else PCIe).
    """

    name: str
    pattern: str
    tflops: float
    memory: float
    link: float
    source: str
    bf16: bool = True


# The first pattern found in the driver's name counts, so variants stand before the plain name.
GPUS = (
    GPU("b200", r"B200", 2250, 178, 900, "NVIDIA HGX B200 data sheet"),
    GPU("gh200", r"GH200", 989, 94, 450, "NVIDIA GH200 data sheet"),
    GPU("h200", r"H200", 989, 139.8, 450, "NVIDIA H200 data sheet"),
    GPU("h100-nvl", r"H100 NVL", 835, 93, 300, "NVIDIA H100 data sheet"),
    GPU("h100-pcie", r"H100 PCIe", 756, 79.1, 64, "NVIDIA H100 data sheet"),
    GPU("h100", r"H100", 989, 79.1, 450, "NVIDIA H100 data sheet (SXM)"),
    GPU("a100", r"A100.*80GB", 312, 79.1, 300, "NVIDIA A100 data sheet (SXM)"),
    GPU("a100-40", r"A100", 312, 39.4, 300, "NVIDIA A100 data sheet (SXM)"),
    GPU("a40", r"A40\b", 149.7, 44, 32, "NVIDIA A40 data sheet"),
    GPU("a6000", r"RTX A6000", 155, 47.4, 32, "NVIDIA RTX A6000 data sheet"),
    GPU("a10g", r"A10G", 70, 22.0, 32, "NVIDIA A10G data sheet"),
    GPU("a10", r"A10\b", 125, 22.0, 32, "NVIDIA A10 data sheet"),
    GPU("l40s", r"L40S", 362, 44.4, 32, "NVIDIA L40S data sheet"),
    GPU("l40", r"L40\b", 181, 44.4, 32, "NVIDIA L40 data sheet"),
    GPU("l4", r"L4\b", 121, 22.0, 32, "NVIDIA L4 data sheet"),
    GPU("5090", r"RTX 5090", 209.5, 31, 64, "NVIDIA RTX Blackwell white paper"),
    GPU("4090", r"RTX 4090", 165.2, 23.5, 32, "NVIDIA Ada white paper"),
    GPU("3090", r"RTX 3090", 71, 23.5, 32, "NVIDIA GA102 white paper"),
    GPU("v100", r"V100.*32GB", 125, 31.7, 150, "NVIDIA V100 data sheet (fp16)", bf16=False),
    GPU("v100-16", r"V100", 125, 15.7, 150, "NVIDIA V100 data sheet (fp16)", bf16=False),
    GPU("t4", r"\bT4\b", 65, 14.6, 16, "NVIDIA T4 data sheet (fp16)", bf16=False),
    GPU("mi300x", r"MI300X", 1307, 191, 448, "AMD Instinct MI300X data sheet"),
)


def gpu(name: str) -> GPU | None:
    """The row of a device by the driver's name for it (`NVIDIA H100 80GB HBM3`); None where there is none."""
    return next((row for row in GPUS if re.search(row.pattern, name)), None)


# What to ask a cluster for with each GPU, where nobody knows better. The training thread, the backward pass, NCCL and
# the copies keep two to four cores busy; a node of eight GPUs with less than 8 × 48 GiB is rare.
CORES_PER_GPU, MEMORY_PER_GPU = 8, 48  # MEMORY_PER_GPU in GiB of the host


def cores() -> int:
    """Cores that this process may use: those it is confined to, and no more than its Slurm job was given.

    Slurm confines a job to its cores only where task/cgroup or task/affinity is set up.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(os.environ.get("SLURM_CPUS_ON_NODE") or here))


def dtype_of(precision: str) -> torch.dtype:
    """PyTorch's dtype of `bf16`, `fp16` or `fp32`."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[precision])
    return found


def peak_resident_bytes() -> int:
    """The most memory that this process has held; `ru_maxrss` is in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
