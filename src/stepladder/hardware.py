"""What GPUs can do, and what this machine and this process have: GPUs, cores, memory, network."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder.errors import LaunchError
from stepladder.suggest import suggest

if TYPE_CHECKING:
    import torch

GIB = 2**30
# What a GPU holds beside PyTorch's tensors: CUDA's context and the libraries' workspaces. About
# 0.5 GiB on today's drivers; NCCL's channels add 0.3 where there are several ranks.
CONTEXT, NCCL = 0.5 * GIB, 0.3 * GIB
HOST_SHARE = 0.75  # of the host's memory: the system and what else runs have the rest
COMMON_HOST = 1024 * GIB  # of a node with 8 large GPUs: AWS's p4d has 1.1 TiB, NVIDIA's DGX H100 2
ALLOCATOR = 0.05  # of the tensors: what PyTorch's caching allocator reserves and cannot use (not measured here)
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


def device(name: str, memory: float | None = None) -> GPU:
    """A GPU by its short name; with `memory`, that GPU with so many GiB.

    Raises:
        LaunchError: it is not known, or the memory is no positive number.
    """
    known = {row.name: row for row in GPUS}
    if name.lower() not in known:
        raise LaunchError(
            f"unknown GPU '{name}'",
            where="command line --gpu",
            help=f"{suggest(name, known) or 'one of ' + ', '.join(known)}; or any with --gpu_memory GiB",
        )
    found = known[name.lower()]
    if memory is None:
        return found
    return dataclasses.replace(found, name=f"{memory:g} GiB", memory=memory)


def device_here(local_ranks: int, gpu: bool) -> GPU:
    """This machine's GPU, or its CPU, with the memory that one rank has for tensors."""
    import torch

    if gpu and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory - CONTEXT - (NCCL if local_ranks > 1 else 0)
        known = gpu_here() or dataclasses.replace(GPUS[0], name=torch.cuda.get_device_name())
        return dataclasses.replace(known, memory=total / GIB)
    # Its speed only puts the ways in order: arithmetic bounds them all.
    return GPU("cpu", "", 1.0, HOST_SHARE * host_memory() / GIB / local_ranks, 10.0, "")


def gpu_here() -> GPU | None:
    """This machine's GPU; None where its peak is not in the table."""
    import torch

    return gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def host_memory() -> float:
    """Bytes of host memory that processes may take: the machine's, or the limit of a container or a job."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get("SLURM_MEM_PER_NODE", "")) * 2**20)
    return min(limit for limit in limits if limit > 0)


def cores() -> int:
    """Cores that this process may use: those it is confined to, and no more than its Slurm job was given.

    Slurm confines a job to its cores only where task/cgroup or task/affinity is set up.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(os.environ.get("SLURM_CPUS_ON_NODE") or here))


def interface(peer: str) -> str:
    """The network interface on the way to another node; empty where it is unknown (IPv6).

    Debian and Ubuntu give a host's own name to 127.0.1.1, where no other node is: the way there, as on the first
    node by hand, is then that of the default route, or the only one that there is.
    """
    import psutil

    cards = psutil.net_if_addrs().items()
    names = {a.address: name for name, addresses in cards for a in addresses if a.family == socket.AF_INET}
    names = {address: name for address, name in names.items() if not address.startswith("127.")}
    for place in (peer, "192.0.2.1"):  # no host has the latter (RFC 5737)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((place, 9))  # sends nothing
            if name := names.get(probe.getsockname()[0]):
                return name
    return next(iter(names.values())) if len(names) == 1 else ""


def dtype_of(precision: str) -> torch.dtype:
    """PyTorch's dtype of `bf16`, `fp16` or `fp32`."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[precision])
    return found


def peak_resident_bytes() -> int:
    """The peak resident memory of this process; `ru_maxrss` is in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
