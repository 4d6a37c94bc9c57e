"""Short hashes by which a resumed run notices that its base model or tokenizer is another one.

Files up to 16 MiB are read whole. Of a larger one the hash covers its size, its first MiB (in it the safetensors
header: names, shapes and dtypes) and 256 blocks of 4 KiB, evenly spaced up to its end: about 2 MiB, however large the
file is. Another training run changes whole tensors: it is noticed. A few edited bytes of a large file are not.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder import console, files
from stepladder.files import read_object
from stepladder.manifest import MANIFEST
from stepladder.model import start
from stepladder.model.start import ADAPTER_CONFIG
from stepladder.model.weights import INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parts = dict[str, str]  # the hash of each part of a thing: a file of a model, a property of a tokenizer
WHOLE = 16 << 20  # bytes up to which a file is read whole
HEAD_BYTES, BLOCK, BLOCKS = 1 << 20, 4 << 10, 256
MODEL_CONFIG, SINGLE = "config.json", "model.safetensors"
# Which library saved a model, from where, and how it generates: no training step depends on them.
NOT_OF_THE_MODEL = {"transformers_version", "peft_version", "_name_or_path", "base_model_name_or_path", "use_cache"}


def hash_model(name: str, revision: str | None = None, with_code: bool = False) -> Parts:
    """The files that a model is loaded from, without torch: its configuration and weights; an adapter's base too.

    Args:
        name: a model or adapter folder, or a hub id, whose snapshot's commit stands for its files.
        revision: of a hub id.
        with_code: whether the folder's Python files are run (`trust_remote_code`).

    Returns:
        Hashes by file name, `base/` before those of an adapter's base; empty where a hub id cannot be resolved.

    Raises:
        OSError: a file cannot be read.
    """
    source = start.resolve_model(name, revision)
    parts = _hash_base(source, with_code)
    if source.adapter:
        return hash_folder(source.adapter) | {f"base/{part}": digest for part, digest in parts.items()}
    return parts


def note_other_base(adapter: Path, base: str, revision: str | None = None) -> str:
    """A note that an adapter's run was trained on other weights than those of `base`; empty where none is known.

    Files of a name that both have are compared: the same weights in other shards are not known to be the same.
    """
    inputs = start.read_if_readable(adapter / MANIFEST).get("inputs")
    trained = inputs.get("model") if isinstance(inputs, dict) else None
    if not isinstance(trained, dict):
        return ""
    ours = _hash_base(start.Start(base, revision), False)
    before = {file.removeprefix("base/"): digest for file, digest in trained.items() if "adapter" not in file}
    names = sorted(n for n in ours.keys() & before.keys() if n.endswith(".safetensors") and ours[n] != before[n])
    return f"{adapter} was trained on other weights than those of {base}: {names[0]} differs" if names else ""


def _hash_base(source: start.Start, with_code: bool) -> Parts:
    folder = Path(source.base)
    if folder.is_dir():
        return hash_folder(folder, with_code)
    snapshot = _hub_snapshot(source.base, source.revision)
    return {"commit": snapshot.name} if snapshot else {}


def hash_folder(folder: Path, with_code: bool = False) -> Parts:
    """The hash of each file of a folder that its model or adapter is loaded from; see `hash_model`."""
    files = _files(folder, with_code)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # a shared file system answers slowly, but many at once
        return {file.name: digest for file, digest in zip(files, pool.map(_hash_file, files), strict=True)}


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Parts:
    """A tokenizer as it was loaded: what turns a text into token ids, but neither padding, truncation nor template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    # Merges are pairs or texts, as the version of the library has it.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.pop("merges", None) or []]
    parts = {
        "vocabulary": model.pop("vocab", None),
        "merges": merges,
        "model": model,
        "normalizer": state["normalizer"],
        "pre-tokenizer": state["pre_tokenizer"],
        "post-processor": state["post_processor"],
        "added tokens": state["added_tokens"],
        "special tokens": {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")},
    }
    # The vocabulary comes in the order of its ids; to sort it takes longer than all the rest.
    return {name: _short(json.dumps(value, sort_keys=name != "vocabulary").encode()) for name, value in parts.items()}


def hash_text(text: str) -> str:
    """The hash of a text: 16 hexadecimal digits of its SHA-256, as all hashes here."""
    return _short(text.encode("utf-8", "surrogatepass"))


def _files(folder: Path, with_code: bool) -> list[Path]:
    """What Transformers and PEFT load from a folder: of several weight files the one that they take."""
    if (folder / ADAPTER_CONFIG).is_file():
        weights = sorted(folder.glob("adapter_model*.*"))
    elif (folder / SINGLE).is_file():
        weights = [folder / SINGLE]
    else:
        try:
            shards = {Path(str(name)).name for name in read_object(folder / INDEX)["weight_map"].values()}
            weights = [folder / INDEX, *(folder / name for name in sorted(shards))]
        except (ValueError, KeyError, AttributeError):  # no index, or a damaged one
            weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    config = ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else MODEL_CONFIG
    code = sorted(folder.glob("*.py")) if with_code else []
    # A FIFO or a folder of such a name is left to whoever loads it.
    return [file for file in (folder / config, *weights, *code) if file.is_file()]


def _hash_file(file: Path) -> str:
    if (size := file.stat().st_size) > WHOLE:
        return _hash_samples(file, size)
    content = file.read_bytes()
    if file.name in (MODEL_CONFIG, ADAPTER_CONFIG):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            config = {key: value for key, value in json.loads(content).items() if key not in NOT_OF_THE_MODEL}
            content = json.dumps(config, sort_keys=True).encode()
    return _short(content)


def _hash_samples(file: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb", buffering=0) as stream:
        handle = stream.fileno()
        digest.update(files.read_at(handle, HEAD_BYTES, 0))
        if sys.platform == "linux":
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # else each block brings 128 KiB of its neighbours
        for number in range(1, BLOCKS + 1):
            digest.update(files.read_at(handle, BLOCK, size * number // BLOCKS - BLOCK))
    return digest.hexdigest()[:16]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _hub_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub id's snapshot in the local cache, after a look at the hub where it can be reached."""
    console.quiet_libraries()
    from huggingface_hub import hf_hub_download

    with contextlib.suppress(Exception):  # not there, no network, no such model: loading it will say which
        return Path(hf_hub_download(name, MODEL_CONFIG, revision=revision)).parent
    return None
