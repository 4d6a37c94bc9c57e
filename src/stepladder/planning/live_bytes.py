"""Count the bytes of live tensors, and keep the worst moment of each phase of a training step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PHASES = ("forward", "loss", "last layer", "first layer")  # the last two: their part of the backward pass


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, real or fake: `now`.

    Storages are counted, so that views cost nothing; what a kernel allocates inside itself is not seen. The same count
    is the forecast (a step on fake tensors) and what it is compared with (a real step).
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that existed before."""
        for part in plain(tensor):
            self._count(part.untyped_storage())

    def measure_again(self) -> None:
        """Count each storage at its present size: FSDP frees what it gathered by resizing, which no operator tells."""
        for storage in [ref() for ref, _ in self._sizes.values()]:
            if storage is not None:
                self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = weakref.ref(storage, functools.partial(self._forget, key)), 0
        ref, before = self._sizes[key]
        self._sizes[key] = ref, size
        self.now += size - before

    def _forget(self, key: int, _: Any) -> None:
        self.now -= self._sizes.pop(key)[1]


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the bytes of one that may be a wrapper, such as a DTensor."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            if isinstance(part := getattr(tensor, name), torch.Tensor):  # a DTensor names its mesh too
                yield from plain(part)
    else:
        yield tensor


class Moments(LiveBytes):
    """Keeps the peak of each phase of a step: all bytes alive, and those of gradients among them.

    `apart` is the peak without the gradients of layers that are done: those which a strategy has sharded by then.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], others: list[torch.Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        for tensor in [*parameters, *others]:
            self.add(tensor)
        self.weights = self.now
        self.operators = 0
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.phase, self.done, self.kept = PHASES[0], 0, 0
        self.worst, self.apart = dict.fromkeys(PHASES, (0, 0)), dict.fromkeys(PHASES, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operators += func.namespace == "aten" and not func.is_view
        self.note()
        return out

    def note(self) -> None:
        """Keep the present moment where it is the worst of its phase."""
        if self.now > self.worst[self.phase][0]:
            self.worst[self.phase] = self.now, self.count_gradients()
        self.apart[self.phase] = max(self.apart[self.phase], self.now - self.done)

    def count_gradients(self) -> int:
        """Bytes of the gradients; some may be parts of one storage."""
        parts = [part.untyped_storage() for p in self.parameters if p.grad is not None for part in plain(p.grad)]
        return sum({storage._cdata: storage.nbytes() for storage in parts}.values())

    def follow(self, base: Any, depth: int) -> torch.nn.ModuleList:
        """Note when each phase begins; returns the model's `depth` layers."""
        layers = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)

        def enter(phase: str | None, *_: Any) -> None:
            self.phase, self.done = phase or self.phase, self.count_gradients()

        def watch(phase: str | None, module: Any, args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(functools.partial(enter, phase))

        def enter_loss(*_: Any) -> None:
            self.phase, self.kept = "loss", self.now

        backward = dict.fromkeys(layers) | {layers[-1]: PHASES[2], layers[0]: PHASES[3]}
        for module, phase in [*backward.items(), (base.get_input_embeddings(), None)]:
            module.register_forward_hook(functools.partial(watch, phase))
        base.get_decoder().register_forward_hook(enter_loss)
        return layers
