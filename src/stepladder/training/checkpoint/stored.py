"""Reading a checkpoint's tensors, of which each rank needs its own part.

A file of `saving.py` holds whole tensors by their names, and flat ranges of tensors as `NAME@START`, with the shape of
the unsharded tensor in its metadata (`shapes`). Nothing is read before `StoredTensor.read`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stepladder.errors import CheckpointError
from stepladder.training.checkpoint.resume import listed_files

SHAPES = "shapes"  # the key in a file's metadata


class StoredTensor:
    """A tensor that lies in one file, or in several by ranges of its flattened elements.

    Args:
        pieces: the index of the first element and safetensors' slice of each piece, in any order.

    Raises:
        CheckpointError: the pieces do not cover the shape.
    """

    def __init__(self, name: str, shape: tuple[int, ...], pieces: list[tuple[int, Any]]):
        self.name, self.shape = name, shape
        self.pieces = [
            (start, start + math.prod(piece.get_shape()), piece) for start, piece in sorted(pieces, key=lambda p: p[0])
        ]
        ends = [0, *(stop for _, stop, _ in self.pieces)]
        if ends[-1] != math.prod(shape) or any(p[0] != end for p, end in zip(self.pieces, ends[:-1], strict=True)):
            raise CheckpointError(
                f"a checkpoint holds a part of {name} only",
                why=f"its pieces do not cover the shape {shape}",
                help="--resume with an older checkpoint",
            )

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The flattened elements from `start` to `stop`, which are read from the files that hold them."""
        parts = [
            _read_range(piece, max(start, first) - first, min(stop, last) - first)
            for first, last, piece in self.pieces
            if max(start, first) < min(stop, last)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def open_tensors(folder: Path, kind: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's files of a kind (`model` or `optimizer`) by name.

    Raises:
        CheckpointError: one is not complete.
    """
    pieces: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in listed_files(folder):
        if not file.name.startswith(f"{kind}-"):
            continue
        tensors = safe_open(file, framework="pt").__enter__()
        unsharded = json.loads((tensors.metadata() or {}).get(SHAPES, "{}"))
        for key in tensors.keys():  # noqa: SIM118
            piece = tensors.get_slice(key)
            name, _, start = key.rpartition("@") if key in unsharded else (key, "", "0")
            pieces[name].append((int(start), piece))
            shapes[name] = tuple(unsharded.get(key, piece.get_shape()))
    return {name: StoredTensor(name, shapes[name], found) for name, found in pieces.items()}


def _read_range(piece: Any, start: int, stop: int) -> torch.Tensor:
    """Flattened elements of a tensor in a file, of which the rows that hold them are read."""
    shape = piece.get_shape()
    if not shape:
        return piece[...].flatten()
    width = math.prod(shape[1:])
    first = start // width
    return piece[first : -(-stop // width)].flatten()[start - first * width : stop - first * width]
