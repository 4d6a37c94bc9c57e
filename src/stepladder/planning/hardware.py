"""The accelerators that a plan knows, and the models whose shapes it has without a hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from stepladder.errors import LaunchError, ModelError
from stepladder.hardware import GPU, GPUS
from stepladder.settings import Settings
from stepladder.suggest import suggest

GIB = 2**30
# What a GPU holds beside PyTorch's tensors: CUDA's context and the libraries' workspaces. About
# 0.5 GiB on today's drivers; NCCL's channels add 0.3 where there are several ranks.
CONTEXT, NCCL = 0.5 * GIB, 0.3 * GIB
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
            way_out=f"{suggest(name, known) or 'one of ' + ', '.join(known)}; or any with --gpu_memory GiB",
        )
    found = known[name.lower()]
    if memory is None:
        return found
    if memory <= 0:
        raise LaunchError(f"a GPU of {memory} GiB cannot be", where="command line --gpu_memory", way_out="its GiB")
    return dataclasses.replace(found, name=f"{memory:g} GiB", memory=memory)


def config(settings: Settings) -> Any:
    """The model's configuration: from its folder, from the shapes that lie here, or from the hub.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    name = str(settings.get("model_name_or_path"))
    shapes = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
    if not Path(name).is_dir() and name in shapes:
        return AutoConfig.for_model(**shapes[name])
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=settings.get("trust_remote_code"))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"'{name}' has no config.json that can be read",
            where=settings.where("model_name_or_path"),
            why=str(error).splitlines()[0],
            way_out=suggest(name, shapes) or "a local folder with config.json, or a hub id (network or cache needed)",
        ) from None
