"""What GPUs can do, and what this machine and this process have: GPUs, cores, memory, network."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
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
    to the next GPU of a node in GB/s one way (NVLink, else PCIe). `fp8` is NVIDIA's compute capability 8.9 and newer.
    """

    name: str
    pattern: str
    tflops: float
    memory: float
    link: float
    source: str
    bf16: bool = True
    fp8: bool = False


# The first pattern found in the driver's name counts, so variants stand before the plain name. Memory is what PyTorch
# reports ("GPU 0 has a total capacity of …" in public logs), which is less than the card's name says. The peaks
# of A10 to L40S, H20, B200 and MI300X agree with other public tables; those of B300, GB200, GB300, MI210 to MI300A,
# MI325X, MI350X, MI355X and the RTX PRO 6000 were not compared with any.
GPUS = (
    GPU("gb300", r"\bGB300", 2500, 276.5, 900, "NVIDIA GB300 NVL72 data sheet", fp8=True),
    GPU("gb200", r"\bGB200", 2500, 184.3, 900, "NVIDIA GB200 NVL72 data sheet", fp8=True),
    GPU("b300", r"\bB300", 2250, 267.7, 900, "NVIDIA HGX B300 data sheet", fp8=True),
    GPU("b200", r"\bB200", 2250, 178, 900, "NVIDIA HGX B200 data sheet", fp8=True),
    GPU("gh200-144", r"\bGH200 144G", 989, 139.8, 450, "NVIDIA GH200 data sheet (HBM3e)", fp8=True),
    GPU("gh200", r"\bGH200", 989, 94, 450, "NVIDIA GH200 data sheet (HBM3)", fp8=True),
    GPU("h200-nvl", r"\bH200 NVL", 835, 139.8, 450, "NVIDIA H200 data sheet", fp8=True),
    GPU("h200", r"\bH200", 989, 139.8, 450, "NVIDIA H200 data sheet", fp8=True),
    GPU("h20", r"\bH20\b", 148, 95, 450, "NVIDIA H20 product brief", fp8=True),
    GPU("h100-nvl", r"\bH100 NVL", 835, 93, 300, "NVIDIA H100 data sheet", fp8=True),
    GPU("h100-pcie", r"\bH100 PCIe", 756, 79.1, 64, "NVIDIA H100 data sheet", fp8=True),
    # MareNostrum 5's, which its driver names without a size
    GPU("h100-64", r"\bH100( 64GB.*)?$", 989, 63.4, 450, "NVIDIA H100 data sheet (SXM); BSC, MareNostrum 5", fp8=True),
    GPU("h100", r"\bH100", 989, 79.1, 450, "NVIDIA H100 data sheet (SXM)", fp8=True),
    # Leonardo's, of 124 multiprocessors where the data sheet's has 108
    GPU("a100-64", r"\bA100-SXM-64GB", 358, 63.4, 300, "Turisini et al., LEONARDO, arXiv:2307.16885"),
    GPU("a100-pcie", r"\bA100 80GB PCIe", 312, 79.1, 32, "NVIDIA A100 data sheet (PCIe)"),
    GPU("a100", r"\bA100.*80GB", 312, 79.1, 300, "NVIDIA A100 data sheet (SXM)"),
    GPU("a100-40-pcie", r"\bA100-PCIE-40GB", 312, 39.4, 32, "NVIDIA A100 data sheet (PCIe)"),
    GPU("a100-40", r"\bA100", 312, 39.4, 300, "NVIDIA A100 data sheet (SXM)"),
    GPU("a40", r"\bA40\b", 149.7, 44, 32, "NVIDIA A40 data sheet"),
    GPU("a30", r"\bA30\b", 165, 23.5, 32, "NVIDIA A30 data sheet"),
    GPU("a6000", r"\bRTX A6000", 155, 47.4, 32, "NVIDIA RTX A6000 data sheet"),
    GPU("a10g", r"\bA10G", 70, 22.0, 32, "NVIDIA A10G data sheet"),
    GPU("a10", r"\bA10\b", 125, 22.0, 32, "NVIDIA A10 data sheet"),
    GPU("l40s", r"\bL40S", 362, 44.4, 32, "NVIDIA L40S data sheet", fp8=True),
    GPU("l40", r"\bL40\b", 181, 44.4, 32, "NVIDIA L40 data sheet", fp8=True),
    GPU("l4", r"\bL4\b", 121, 22.0, 32, "NVIDIA L4 data sheet", fp8=True),
    GPU("pro-6000-max-q", r"\bRTX PRO 6000 .*Max-Q", 438.9, 94.9, 64, "NVIDIA RTX PRO Blackwell white paper", fp8=True),
    GPU("pro-6000", r"\bRTX PRO 6000", 503.8, 94.9, 64, "NVIDIA RTX PRO Blackwell white paper", fp8=True),
    GPU("6000-ada", r"\bRTX 6000 Ada", 364.2, 47.4, 32, "NVIDIA Ada white paper", fp8=True),
    GPU("5090", r"\bRTX 5090(?! D| Laptop)", 209.5, 31, 64, "NVIDIA RTX Blackwell white paper", fp8=True),
    GPU("4090", r"\bRTX 4090(?! D| Laptop)", 165.2, 23.5, 32, "NVIDIA Ada white paper", fp8=True),
    GPU("3090", r"\bRTX 3090(?! Ti)", 71, 23.5, 32, "NVIDIA GA102 white paper"),
    GPU("v100-pcie", r"\bV100-PCIE-32GB", 112, 31.7, 16, "NVIDIA V100 data sheet (fp16)", bf16=False),
    GPU("v100-16-pcie", r"\bV100-PCIE", 112, 15.7, 16, "NVIDIA V100 data sheet (fp16)", bf16=False),
    GPU("v100", r"\bV100-.*32GB", 125, 31.7, 150, "NVIDIA V100 data sheet (fp16)", bf16=False),
    GPU("v100-16", r"\bV100-", 125, 15.7, 150, "NVIDIA V100 data sheet (fp16)", bf16=False),
    GPU("t4", r"\bT4\b", 65, 14.6, 16, "NVIDIA T4 data sheet (fp16)", bf16=False),
    GPU("mi355x", r"\bMI355X", 2516, 287.9, 537, "AMD Instinct MI355X data sheet"),
    GPU("mi350x", r"\bMI350X", 2307, 287.9, 537, "AMD Instinct MI350X data sheet"),
    GPU("mi325x", r"\bMI325X", 1307, 255.6, 448, "AMD Instinct MI325X data sheet"),
    GPU("mi300x", r"\bMI300X", 1307, 191, 448, "AMD Instinct MI300X data sheet"),
    # Its 128 GiB are the host's memory too, of which the host's share is the site's choice.
    GPU("mi300a", r"\bMI300A", 980.6, 120, 384, "AMD Instinct MI300A data sheet"),
    # Two dies, each a GPU to ROCm and to Slurm; the slowest links between dies have 50 GB/s one way.
    GPU("mi250x", r"\bMI250X", 191.5, 63.9, 50, "AMD Instinct MI250X data sheet (one of two dies)"),
    GPU("mi250", r"\bMI250\b", 181, 63.9, 50, "AMD Instinct MI250 data sheet (one of two dies)"),
    GPU("mi210", r"\bMI210", 181, 63.9, 50, "AMD Instinct MI210 data sheet"),
)
# A slice of a GPU (MIG): `MIG 1g.10gb` in the driver's name, `a100_1g.10gb` as Slurm's type. A compute instance within
# a slice, `MIG 1c.3g.20gb`, has 1 of its 3.
SLICE = re.compile(r"(?i)[ _-]+(?:MIG )?(?P<profile>(?:(?P<part>\d)c\.)?(?P<compute>\d)g\.(?P<gb>\d+)gb\S*)$")
ONE_SLICE = "a process sees one slice, whatever it is given (NVIDIA's MIG user guide), so all ranks would be on it"
IN_FOUR = ("a30", "pro-6000", "pro-6000-max-q")  # compute slices of the whole; 7 of the others
SLICE_MEMORY = 0.95  # GiB of a slice for each GB in its name: 9856 MiB of the A100's 1g.10gb
COMMON = "h100"  # whose speed is assumed where another is not known
NO_INTEL = "it runs on PyTorch's CUDA and ROCm devices; on Intel's GPUs (torch.xpu) nothing of it was made or tried"
INTEL = re.compile(r"(?i)max[ _-]?1[15][05]0|\bpvc\b|\bxpu\b")


def gpu(name: str) -> GPU | None:
    """The row of a device by the driver's name for it (`NVIDIA H100 80GB HBM3`), a MIG slice by its share of that row.

    None where there is no row.
    """
    part = SLICE.search(name)
    whole = name[: part.start()] if part else name
    return _slice(next((row for row in GPUS if re.search(row.pattern, whole)), None), part)


def gpu_by_short_name(name: str) -> GPU | None:
    """The row of a short name as it is typed or as Slurm's type has it: `h100`, `a100_1g.10gb`; None without one.

    Raises:
        LaunchError: it is Intel's.
    """
    if INTEL.search(name):
        raise LaunchError(f"Stepladder does not train on '{name}'", where="command line", why=NO_INTEL)
    part = SLICE.search(name)
    whole = (name[: part.start()] if part else name).lower()
    return _slice(next((row for row in GPUS if row.name == whole), None), part)


def _slice(row: GPU | None, part: re.Match[str] | None) -> GPU | None:
    """A slice's share of the GPU; memory by the slice's name, its only link the host's."""
    if row is None or part is None:
        return row
    share = int(part["part"] or part["compute"]) / (4 if row.name in IN_FOUR else 7)
    return dataclasses.replace(
        row, name=f"{row.name}-{part['profile']}", tflops=row.tflops * share, memory=int(part["gb"]) * SLICE_MEMORY,
        link=min(row.link, 32), source=f"{row.source}, {share:.0%} of it by NVIDIA's MIG user guide",
    )  # fmt: skip


# What to ask a cluster for with each GPU, where nobody knows better. The training thread, the backward pass, NCCL and
# the copies keep two to four cores busy; a node of eight GPUs with less than 8 × 48 GiB is rare.
CORES_PER_GPU, MEMORY_PER_GPU = 8, 48  # MEMORY_PER_GPU in GiB of the host


def device(name: str, memory: float | None = None) -> GPU:
    """A GPU by its short name; with `memory`, that GPU with so many GiB.

    Raises:
        LaunchError: it is not known, or Stepladder does not train on it.
    """
    if not (found := gpu_by_short_name(name)):
        known = {row.name: row for row in GPUS}
        raise LaunchError(
            f"unknown GPU '{name}'",
            where="command line --gpu",
            help=f"{suggest(name, known) or 'one of ' + ', '.join(known)}; or any with --gpu_memory GiB",
        )
    if memory is None:
        return found
    return dataclasses.replace(found, name=f"{memory:g} GiB", memory=memory)


def device_here(local_ranks: int, gpu: bool) -> GPU:
    """This machine's GPU, or its CPU, with the memory that one rank has for tensors.

    Apple's GPU shares the host's memory, of which it gets what a CPU would.
    """
    import torch

    if gpu and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory - CONTEXT - (NCCL if local_ranks > 1 else 0)
        known = gpu_here() or dataclasses.replace(device(COMMON), name=torch.cuda.get_device_name())
        return dataclasses.replace(known, memory=total / GIB)
    # Its speed only puts the ways in order: arithmetic bounds them all.
    name = "Apple's GPU, whose memory is the host's" if gpu and accelerator() == "mps" else "cpu"
    return GPU(name, "", 1.0, HOST_SHARE * host_memory() / GIB / local_ranks, 10.0, "")


def accelerator() -> str:
    """What this process computes on: `cuda` (AMD's GPUs too), `mps` (Apple's) or `cpu`.

    CUDA_VISIBLE_DEVICES= (empty), which `use_cpu` sets, hides Apple's GPU too: PyTorch has no variable for that.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"


def gpu_here() -> GPU | None:
    """This machine's GPU; None where its peak is not in the table."""
    import torch

    return gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def host_memory() -> float:
    """Bytes of host memory that processes may take: the machine's, or the limit of a container or a job."""
    import psutil

    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
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


def interfaces_beside(name: str) -> list[str]:
    """The interfaces of one network, `hsn0` to `hsn3`: those that are up and differ from `name` in their number alone.

    Of another network of the same prefix, as where each card has a switch of its own, the others cannot be reached.
    """
    import psutil

    def network(card: str) -> set[str]:
        found = (a for a in psutil.net_if_addrs()[card] if a.family == socket.AF_INET and a.netmask)
        return {str(ipaddress.ip_interface(f"{a.address}/{a.netmask}").network) for a in found}

    def kind(card: str) -> str:
        return card.rstrip("0123456789")

    up = [card for card, state in psutil.net_if_stats().items() if state.isup and card in psutil.net_if_addrs()]
    beside = [card for card in up if kind(card) == kind(name) != card and network(card) & network(name)]
    return sorted({name, *beside}, key=lambda card: (len(card), card))


def dtype_of(precision: str) -> torch.dtype:
    """PyTorch's dtype of `bf16`, `fp16` or `fp32`."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[precision])
    return found


def peak_resident_bytes() -> int:
    """The peak resident memory of this process; `ru_maxrss` is in KiB on Linux and in bytes on macOS."""
    if sys.platform == "win32":
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
