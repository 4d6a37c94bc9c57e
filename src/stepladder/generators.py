"""The random generators of a process: Python's, NumPy's, PyTorch's on the host and on the GPU (CUDA, ROCm or MPS)."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import hardware

if TYPE_CHECKING:
    import torch


def save(file: Path) -> None:
    """Write the states of all generators as safetensors."""
    import numpy as np
    from safetensors.torch import save_file

    numbers: Any = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()
    save_file(_torch_states(), file, {"python": json.dumps(random.getstate()), "numpy": json.dumps(numbers)})


def load(file: Path) -> None:
    """Put the states of a file back; one of a kind of GPU that is not here changes nothing."""
    import numpy as np
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
        _set_torch_states({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    version, numbers, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(json.loads(metadata["numpy"]))


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Put PyTorch's generators back at the end. `torch.random.fork_rng` takes MPS only where it is named as such."""
    before = _torch_states()
    try:
        yield
    finally:
        _set_torch_states(before)


def _torch_states() -> dict[str, torch.Tensor]:
    import torch

    states, kind = {"cpu": torch.get_rng_state()}, hardware.accelerator()
    if kind != "cpu":
        states[kind] = getattr(torch, kind).get_rng_state()
    return states


def _set_torch_states(states: dict[str, torch.Tensor]) -> None:
    import torch

    torch.set_rng_state(states["cpu"])
    kind = hardware.accelerator()
    if kind != "cpu" and kind in states:
        getattr(torch, kind).set_rng_state(states[kind])
