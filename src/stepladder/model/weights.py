"""A model's or adapter's tensors on disk: checked, read and written one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder.errors import ModelError
from stepladder.files import read_object
from stepladder.model.start import ADAPTER

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name, torch's
CODES = {name: code for code, name in FLOATS.items()}
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Tensor(NamedTuple):
    """Where a tensor lies, or what is to be written: safetensors' dtype (`BF16`, …) and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor by its name."""
    try:
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise ValueError("it lists no shards")
        if elsewhere := [file for file in shards.values() if file != Path(file).name]:
            raise ValueError(f"it names {elsewhere[0]!r}, which is no file beside it")
    except ValueError as error:
        raise ModelError(f"{index} cannot be used: {error}", help="fetch or copy the folder again") from None
    return shards


class Weights:
    """The safetensors of a model or adapter folder; a tensor is in memory only while someone holds it.

    Raises:
        ModelError: no safetensors, a shard that is missing or truncated, a tensor that no shard holds.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors"):
        self.folder = folder
        listed: dict[str, str] = {}
        if (folder / INDEX).is_file():
            listed = _weight_map(folder / INDEX)
        files = sorted(set(listed.values())) or [single]
        self.tensors: dict[str, Tensor] = {}
        for file in files:
            self.tensors |= self._headers(file)
        if missing := sorted(listed.keys() - self.tensors.keys()):
            raise ModelError(f"{missing[0]} is listed in {INDEX} and in none of its shards", where=str(folder))

    def _headers(self, file: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        if not path.is_file():
            pickles = [p.name for p in self.folder.glob("*.bin")]
            raise ModelError(
                f"{self.folder} lacks {file}",
                why=f"{pickles[0]} is a pickle, which can run code when it is opened, and is not read"
                if pickles
                else "the weights are not whole without it",
                help="convert the weights to safetensors" if pickles else "fetch or copy the folder again",
            )
        try:
            with safe_open(path, framework="np") as shard:  # the header alone is read, without torch
                slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                return {n: Tensor(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except SafetensorError as error:
            raise ModelError(f"{path} is truncated or damaged", why=str(error), help="fetch or copy it again") from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: opened anew each time, so that no page stays in memory for longer."""
        from safetensors import safe_open

        with safe_open(self.folder / self.tensors[name].file, framework="pt") as shard:
            return shard.get_tensor(name)

    def dtype(self) -> torch.dtype:
        """What most of the folder's numbers are held in."""
        import torch

        sizes = {code: sum(t.bytes for t in self.tensors.values() if t.dtype == code) for code in FLOATS}
        return getattr(torch, FLOATS[max(sizes, key=lambda code: sizes[code])])


def apply_umask(folder: Path) -> None:
    """Give the weights in a folder the permissions that any new file gets here.

    safetensors 0.8 leaves its files to their owner alone (0600), whatever the umask: colleagues and a
    cluster's other users could not load what they are shown.
    """
    os.umask(mask := os.umask(0o077))
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    produce: Callable[[str], torch.Tensor],
    limit: int,
    progress: Callable[[int, int], None],
) -> int:
    """Write shards and their index; what `produce` returns is written and forgotten before the next is asked for.

    The format (https://github.com/huggingface/safetensors#format) is a length, a JSON header and the
    bytes; safetensors' own `save_file` wants all tensors of a shard in memory.

    Returns:
        The number of shards.
    """
    import torch

    parts: list[list[str]] = [[]]  # the names of each shard: at most `limit` bytes, or one tensor
    size = total = done = 0
    for name, planned in tensors.items():
        if parts[-1] and size + planned.bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size, total = size + planned.bytes, total + planned.bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + tensors[name].bytes
            header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins aligned
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = produce(name).detach().contiguous().cpu()
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                done += tensors[name].bytes
                progress(done, total)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(parts)


def dtype_name(dtype: torch.dtype | str) -> str:
    """PyTorch's name of a dtype, as Transformers and PEFT write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# ---- an adapter's ----


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in its file; ModelError where a number is not finite."""
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"the adapter holds numbers that are not finite, in {name}",
                where=str(folder / ADAPTER),
                help="train it again",
            )
    return tensors


def check_saved_adapter(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the adapter in `folder` holds exactly the trained tensors, finite and learned.

    Args:
        folder: where it was saved.
        expected: the shape of each tensor by its name in the file.

    Sharded strategies have saved empty adapters without a word (trl#4416, peft#2450).
    """
    file = folder / ADAPTER
    if not file.is_file():
        raise ModelError(f"no adapter was saved in {folder}")
    tensors = read_adapter(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ModelError(
            f"the saved adapter is not the one that was trained: {len(shapes)} tensors, expected {len(expected)}",
            where=str(file),
            why=differences(shapes, expected),
        )
    matrices = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if matrices and not any(tensor.any() for tensor in matrices):
        raise ModelError(
            "every B matrix of the saved adapter is zero: nothing was learned",
            where=str(file),
            why="B begins as zeros, and only a step with a learning rate above 0 changes it",
            help="train more steps: under warmup_steps the first has a rate of 0 (`learning_rate` in metrics.jsonl)",
        )


def differences(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """Which tensors are missing, unexpected or of another shape; empty where none is."""
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    wrong = sorted(n for n in shapes.keys() & expected.keys() if shapes[n] != expected[n])
    faults = (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
    return "; ".join(f"{label}: {names[0]}{more(names)}" for label, names in faults if names)
