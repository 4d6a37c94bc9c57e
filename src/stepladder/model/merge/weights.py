"""A model's tensors on disk: checked, read one at a time, written one at a time."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder.errors import ModelError
from stepladder.files import make_folder, open_lock, read_object, remove
from stepladder.manifest import LOCK

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name, torch's
MARK = "merge.json"  # what tells a merge from other folders
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
        found = read_object(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("it lists no shards")
        if far := [file for file in found.values() if file != Path(file).name]:
            raise ValueError(f"it names {far[0]!r}, which is no file beside it")
    except ValueError as error:
        raise ModelError(f"{index} cannot be used: {error}", help="fetch or copy the folder again") from None
    return found


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


def shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """The names of each shard, in order: a shard holds at most `limit` bytes, or one tensor."""
    found: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if found[-1] and size + tensor.bytes > limit:
            found.append([])
            size = 0
        found[-1].append(name)
        size += tensor.bytes
    return found


def share(folder: Path) -> None:
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

    parts = shards(tensors, limit)
    total, done = sum(tensor.bytes for tensor in tensors.values()), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + tensors[name].bytes
            header[name] = {
                "dtype": tensors[name].dtype,
                "shape": tensors[name].shape,
                "data_offsets": [offset, end],
            }
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
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return len(parts)


def dtype(disk: Weights) -> torch.dtype:
    """What most of the folder's numbers are held in."""
    import torch

    sizes = {code: sum(t.bytes for t in disk.tensors.values() if t.dtype == code) for code in FLOATS}
    return getattr(torch, FLOATS[max(sizes, key=lambda code: sizes[code])])


def name_of(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype, as Transformers and PEFT write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Raise ModelError where the folder holds anything, but for a merge that may be overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        is_merge = (folder / MARK).is_file()
        if overwrite and is_merge:
            return
        raise ModelError(
            f"{folder} exists" + (" and is no merge" if overwrite else ""),
            why="nothing that existed is overwritten",
            help="another --output_dir" + (", or --overwrite to replace that merge" if is_merge else ""),
        )


@contextmanager
def beside(folder: Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well, and is removed when it does not.

    Args:
        needed: bytes that will be written.
        overwrite: whether it may take the place of another merge, which stands until then.

    Raises:
        ModelError: not enough space, a file of the user's where the work would be, or another merge is at work there.
    """
    check_output(folder, overwrite)
    part, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    names = {file.name for file in part.iterdir()} if part.is_dir() and not part.is_symlink() else {""}
    if os.path.lexists(part) and MARK not in names and names - {LOCK}:
        raise ModelError(f"{part} exists, and the work is done there", help="remove it")
    make_folder(part)
    with open_lock(part / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (part / LOCK).stat()  # not there: the other one has just ended
        except (BlockingIOError, FileNotFoundError):
            raise ModelError(
                f"another process is merging into {folder}", help="wait for it or end it, or another --output_dir"
            ) from None
        try:
            for file in part.iterdir():  # what a merge left that was killed
                if file.name != LOCK:
                    remove(file)
            (part / MARK).write_text('{"status": "merging"}\n')
            free = shutil.disk_usage(folder.parent).free
            if free < needed + 2**26:  # 64 MiB for the tokenizer and the other small files
                raise ModelError(
                    f"{needed / 1e9:.1f} GB are needed in {folder.parent}, and {free / 1e9:.1f} GB are free",
                    help="make room, another --output_dir, or --dtype bf16 where it is fp32",
                )
            yield part
            (part / LOCK).unlink()
            check_output(folder, overwrite)  # something may lie there by now
            if (folder / MARK).is_file():
                os.replace(folder, old)
            os.replace(part, folder)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(part)
            raise
