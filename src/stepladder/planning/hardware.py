"""The accelerators that a plan knows, and the models whose shapes it has without a hub."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from stepladder import hardware
from stepladder.errors import LaunchError, ModelError
from stepladder.hardware import GPU, GPUS
from stepladder.model import pretrained, start
from stepladder.settings import Settings
from stepladder.suggest import suggest

GIB = 2**30
# What a GPU holds beside PyTorch's tensors: CUDA's context and the libraries' workspaces. About
# 0.5 GiB on today's drivers; NCCL's channels add 0.3 where there are several ranks.
CONTEXT, NCCL = 0.5 * GIB, 0.3 * GIB
HOST_SHARE = 0.75  # of the host's memory: the system and what else runs have the rest
COMMON_HOST = 1024 * GIB  # of a node with 8 large GPUs: AWS's p4d has 1.1 TiB, NVIDIA's DGX H100 2
ALLOCATOR = 0.05  # of the tensors: what PyTorch's caching allocator reserves and cannot use (not measured here)


def device(name: str, memory: float | None = None) -> GPU:
    """A GPU by its short name; with `memory`, one of that name's speed and so many GiB.

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


def here(local_ranks: int, gpu: bool) -> GPU:
    """What one rank of this machine has for tensors: of its GPU, or its share of the host's memory."""
    import torch

    if gpu and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory - CONTEXT - (NCCL if local_ranks > 1 else 0)
        known = gpu_here() or dataclasses.replace(GPUS[0], name=torch.cuda.get_device_name())
        return dataclasses.replace(known, memory=total / GIB)
    # Its speed only puts the ways in order: arithmetic bounds them all.
    return GPU("cpu", "", 1.0, HOST_SHARE * host_memory() / GIB / local_ranks, 10.0, "")


def gpu_here() -> GPU | None:
    """This machine's GPU, where its peak is stated."""
    import torch

    return hardware.gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def host_memory() -> float:
    """Bytes of this machine's memory that its processes may take: a container or a job may have less than it has."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get("SLURM_MEM_PER_NODE", "")) * 2**20)
    return min(limit for limit in limits if limit > 0)


def config(settings: Settings) -> Any:
    """The model's configuration: from its folder, from the shapes that lie here, or from the hub.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    source = start.find_for(settings)
    name = source.base
    shapes = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
    if not Path(name).is_dir() and name in shapes:
        return AutoConfig.for_model(**shapes[name])
    start.check_files(Path(name), settings.where("model_name_or_path"))
    revision = source.revision if source.adapter else None
    try:
        code = bool(settings.get("trust_remote_code"))
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=code)
    except Exception as error:  # values of another kind raise whatever the expressions that read them raise
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise pretrained.needs_code(name, settings.where("model_name_or_path")) from None
        raise ModelError(
            f"'{name}' has no config.json that can be read",
            where=settings.where("model_name_or_path"),
            why=" ".join(line.strip() for line in (str(error) or type(error).__name__).splitlines()[:2]),
            help=suggest(name, shapes) or "a local folder with config.json, or a hub id (network or cache needed)",
        ) from None
