"""Writing a rank's files of a checkpoint in threads, while the training goes on.

A file's SHA-256 is taken of the bytes as they are written, so nothing is read again. safetensors' own `save_file` wants
a file's tensors together and gives no hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stepladder.files import flush, hash_file
from stepladder.model import weights
from stepladder.training.checkpoint.loading import SHAPES
from stepladder.training.checkpoint.state import Piece

PART_BYTES = 1 << 30  # of a file, unless one tensor is larger: several files are written and verified at once
CHUNK_BYTES = 1 << 24  # written and hashed at once
THREADS = 4
CODES = {**weights.CODES, "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


class Part(NamedTuple):
    """A file that is to be written."""

    name: str
    pieces: list[tuple[str, Piece]]


def cut_into_parts(stem: str, pieces: list[tuple[str, Piece]]) -> list[Part]:
    """Files of about `PART_BYTES` bytes for the pieces, which are given by the names of their tensors."""
    groups: list[list[tuple[str, Piece]]] = [[]]
    size = 0
    for name, piece in pieces:
        if groups[-1] and size + piece.values.nbytes > PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, piece))
        size += piece.values.nbytes
    return [Part(f"{stem}-{number}.safetensors", group) for number, group in enumerate(groups) if group]


class Writer:
    """Writes and hashes files until all are on the disk, or one cannot be written.

    Args:
        parts: what is to be written; a part's memory is freed once it is.
        written: names of files that are in the folder already, to be flushed and hashed.

    Attributes:
        files: size and hash of each file that is on the disk.
        fault: why a file could not be written; the others are left then.
        moved: grows with each chunk.
    """

    def __init__(self, folder: Path, parts: list[Part], written: list[str]):
        self.folder, self.fault, self.moved = folder, "", 0
        self.files: dict[str, dict[str, Any]] = {}
        self._left: deque[Part | str] = deque([*parts, *written])
        self._busy: dict[str, str] = {}  # the file of each thread
        count = min(THREADS, len(self._left))
        self._threads = [threading.Thread(target=self._work, daemon=True, name=f"writer-{n}") for n in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def writes(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def wait(self, seconds: float) -> None:
        """Wait until all is written, at most so long."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def describe(self) -> str:
        """What it is doing, for the message of a hang."""
        files = ", ".join(sorted(self._busy.values()))
        return f"while {self.folder / files} is written" if files else f"while other ranks write {self.folder}"

    def _work(self) -> None:
        own = threading.current_thread().name
        while not self.fault:
            try:
                task = self._left.popleft()
            except IndexError:
                return
            name = self._busy[own] = task if isinstance(task, str) else task.name
            try:
                digest = self._hash_written(name) if isinstance(task, str) else self._write(task)
                self.files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": digest}
            except Exception as error:  # of any kind: a checkpoint without this file must not be completed
                self.fault = self.fault or f"{name}: {type(error).__name__}: {error}"
            del self._busy[own], task

    def _hash_written(self, name: str) -> str:
        flush(self.folder / name)
        return hash_file(self.folder / name)

    def _write(self, part: Part) -> str:
        """Write a file in safetensors' format (https://github.com/huggingface/safetensors#format); returns its hash."""
        pieces = sorted(part.pieces, key=lambda entry: -entry[1].values.itemsize)  # so that all are aligned
        header: dict[str, Any] = {
            "__metadata__": {"format": "pt", SHAPES: json.dumps({k: [*p.shape] for k, p in pieces if p.sharded})}
        }
        offset = 0
        for name, piece in pieces:
            values, end = piece.values, offset + piece.values.nbytes
            shape = [values.numel()] if piece.sharded else [*piece.shape]
            code = CODES[weights.dtype_name(values.dtype)]
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with (self.folder / part.name).open("wb") as out:

            def write(data: Any) -> None:
                digest.update(data)
                out.write(data)
                self.moved += 1

            write(len(text).to_bytes(8, "little") + text)
            for _, piece in pieces:
                _write_tensor(piece.values, write)
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest()


def _write_tensor(values: torch.Tensor, write: Callable[[Any], None]) -> None:
    data = values.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), CHUNK_BYTES):
        write(data[start : start + CHUNK_BYTES])
