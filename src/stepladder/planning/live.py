"""How many bytes of tensors are alive, counted as PyTorch computes: on real tensors, or on fake ones.

The same count is the forecast (a step on fake tensors) and the truth it is held to (a real step).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside it, `peak` is the most bytes that were alive at once since the last `restart`.

    Storages are counted, so that views cost nothing; what a kernel allocates inside itself is not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.note()
        return out

    def note(self) -> None:
        self.peak = max(self.peak, self.now)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made before."""
        for part in plain(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                ref = weakref.ref(storage, functools.partial(self._forget, key))
                self._sizes[key] = ref, storage.nbytes()
                self.now += storage.nbytes()

    def _forget(self, key: int, _: Any) -> None:
        self.now -= self._sizes.pop(key)[1]

    def restart(self) -> None:
        self.peak = self.now

    def recount(self) -> None:
        """Read all sizes anew: FSDP frees a gathered weight by resizing its storage."""
        for key, (ref, _) in list(self._sizes.items()):
            if (storage := ref()) is not None:
                self._sizes[key] = ref, storage.nbytes()
        self.now = sum(size for _, size in self._sizes.values())


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the bytes of one which may be a wrapper, as a DTensor is of its local part."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            if isinstance(part := getattr(tensor, name), torch.Tensor):  # a DTensor names its mesh too
                yield from plain(part)
    else:
        yield tensor
