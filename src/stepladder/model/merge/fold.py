"""A merge as scripts/merge.py asks for it: opened, proved, written beside its place, described, and uploaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import console, files, hardware, installation, manifest, run
from stepladder.errors import ModelError, first_line
from stepladder.model import card, fingerprint, portable, pretrained, start, weights
from stepladder.model.merge import gguf_file, llama_cpp_text
from stepladder.model.merge.methods import StreamedMerge, WholeMerge, open_merge
from stepladder.model.merge.proof import Proof
from stepladder.model.merge.skeleton import RoundTrip, read_configs
from stepladder.model.new_tokens import needed_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Prompts = Callable[["PreTrainedTokenizerBase"], list[list[int]]]


@dataclass(frozen=True)
class _Parts:
    """What is merged, and what is written beside the weights."""

    name: str  # the base's, as it was named
    base: Path
    trained: dict[str, Any]  # run.json of the first adapter's run
    losses: list[float]
    tokenizer: PreTrainedTokenizerBase
    work: StreamedMerge | WholeMerge
    because: str | None  # why it is not streamed
    modelfile: str  # Ollama's; empty where it is not asked for
    gguf: gguf_file.GGUFFile | None
    gguf_name: str


def _parts(args: argparse.Namespace) -> _Parts:
    config = read_configs(args.adapter)[0]
    runs = [card.read_training(folder) for folder in args.adapter]
    trained, losses = runs[0]
    in_4_bits = next((each for each, _ in runs if each.get("recipe", {}).get("load_in_4bit")), trained)
    quantize = choose_base(args.quantized_base, in_4_bits)
    source = start.resolve_model(str(args.adapter[0]))
    name = args.base or source.base
    base = _find_base(name, None if args.base else config.revision)
    if replaced := next(
        (folder for folder in (base, *args.adapter) if folder.resolve().is_relative_to(args.output_dir.resolve())), None
    ):
        raise ModelError(
            f"--output_dir {args.output_dir} holds {replaced}, which is merged",
            why="the result would take its place",
            help="another --output_dir",
        )
    tokenizer = pretrained.load_tokenizer(str(args.adapter[0] if source.has_tokenizer else base))
    defaults = base / "generation_config.json"
    generation = files.read_object(defaults) if defaults.is_file() else {}  # `_find_base` has looked at it
    generation["eos_token_id"] = pretrained.end_tokens(tokenizer, generation.get("eos_token_id"))
    gguf_name = f"{args.output_dir.name}-{args.gguf}.gguf" if args.gguf else "."
    modelfile = llama_cpp_text.modelfile(tokenizer, generation, gguf_name) if args.ollama else ""
    rows = needed_rows(tokenizer)
    work, because = open_merge(base, args.adapter, args.weights, quantize, rows, args.device, args.combination)
    if because:
        console.warn(f"note: the whole model is loaded, in fp32: {because}")
    if args.ollama and not args.gguf:
        llama_cpp_text.check_ollama((work.config.architectures or ["this model"])[0])
    gguf = gguf_file.GGUFFile(work.config, tokenizer, generation["eos_token_id"], args.gguf) if args.gguf else None
    return _Parts(name, base, trained, losses, tokenizer, work, because, modelfile, gguf, gguf_name)


def merge(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Merge as the arguments say; returns merge.json.

    Args:
        prompts: the token ids of the prompts that the proof is made by.

    Raises:
        ModelError: adapter and base do not fit, the output is taken, or the merged model is not base and adapter.
    """
    began = time.perf_counter()
    parts = _parts(args)
    work = parts.work
    dtype = hardware.dtype_of(args.dtype) if args.dtype else work.disk.dtype()
    plan = work.plan(dtype)
    needed = _bytes(plan) + (parts.gguf.max_bytes(plan) if parts.gguf else 0)
    with work_folder(args.output_dir, needed, args.overwrite) as folder:
        check = None if args.no_verify else Proof(work, prompts(parts.tokenizer))
        facts = _write(args, parts, folder, dtype, check)
        facts["seconds"] = round(time.perf_counter() - began, 1)
        facts["peak_memory_bytes"] = hardware.peak_resident_bytes()
        files.write_atomic(folder / start.MERGE, json.dumps(facts, indent=2) + "\n")
        if parts.modelfile:
            files.write_atomic(folder / "Modelfile", parts.modelfile)
        licence = card.front_matter(parts.base).get("license")
        text = card.render(args.output_dir, parts.name, licence, parts.trained, parts.losses, facts)
        files.write_atomic(folder / "README.md", text)
    return facts


def _write(
    args: argparse.Namespace, parts: _Parts, folder: Path, dtype: torch.dtype, check: Proof | None
) -> dict[str, Any]:
    """Write weights, tokenizer and GGUF file, and compare them; returns merge.json without its totals."""
    writing = time.perf_counter()
    shards = parts.work.write(folder, dtype, args.max_shard_size, _show_progress)
    seconds = time.perf_counter() - writing
    _save_tokenizer(parts.tokenizer, parts.base, folder)
    remarks = [note for path in args.adapter if (note := fingerprint.note_other_base(path, str(parts.base)))]
    remarks += portable.add_older_names(folder, parts.tokenizer) + (parts.gguf.remarks if parts.gguf else [])
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    return {
        "status": "proved" if check else "unverified",
        "base": parts.name,
        "adapters": [str(path) for path in args.adapter],
        "weights": args.weights,
        "combination": dataclasses.asdict(args.combination) if args.combination else None,
        "quantized_base": args.quantized_base,
        "dtype": weights.dtype_name(dtype),
        "streamed": parts.because is None,
        "bytes": _bytes(parts.work.plan(dtype)),
        "shards": shards,
        "merge_seconds": round(seconds, 1),
        "proof": check.compare(folder, dtype) if check else None,
        "remarks": remarks,
        "gguf": parts.gguf.write_and_compare(folder, parts.gguf_name, check) if parts.gguf else None,
        "ollama": bool(parts.modelfile),
        "packages": run.package_versions(),
        "command": installation.typed_command(),
    }


def _bytes(plan: dict[str, weights.Tensor]) -> int:
    return sum(tensor.bytes for tensor in plan.values())


def _show_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        console.redraw(f"  merging {done / 1e9:.2f} of {total / 1e9:.2f} GB" + "\n" * (done == total))


def _find_base(name: str, revision: str | None = None) -> Path:
    """The folder of a base whose weights an adapter can be folded into.

    Raises:
        ModelError: as `pretrained.find_folder`, or it is an adapter itself, or quantized already.
    """
    folder = pretrained.find_folder(name, revision)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no base model: it has no config.json", help="--base")
    if "quantization_config" in files.read_object(folder / "config.json"):  # which `check_source` has read
        raise ModelError(
            f"{name} holds quantized weights, which an adapter cannot be folded into",
            help="--base with the model that they were made from",
        )
    return folder


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Put the tokenizer beside a merged model, and let the model stop where the tokenizer's template ends a turn."""
    from transformers import GenerationConfig

    tokenizer.save_pretrained(folder)
    has_own = (base / "generation_config.json").is_file()
    config = pretrained.load_config(folder)
    generation = GenerationConfig.from_pretrained(base) if has_own else GenerationConfig()
    pretrained.clear_sampling(generation)
    generation.eos_token_id = config.eos_token_id = pretrained.end_tokens(
        tokenizer, generation.eos_token_id, config.eos_token_id
    )
    for saved in (config, generation):
        if saved.pad_token_id is None:
            saved.pad_token_id = tokenizer.pad_token_id
        saved.save_pretrained(folder)


def choose_base(choice: str | None, trained: dict[str, Any]) -> RoundTrip | None:
    """Which base the adapter goes onto: None for the base's own weights.

    Args:
        choice: `original`, `dequantized`, or None where nobody chose.
        trained: the adapter's run.json; empty where the adapter was trained elsewhere.

    Raises:
        ModelError: the adapter was trained in 4 bits and nobody chose, or the choice has no effect.
    """
    recipe = trained.get("recipe", {})
    if trained and not recipe.get("load_in_4bit"):
        if choice:
            raise ModelError(
                "--quantized_base has no effect here: the adapter's base was not in 4 bits", help="remove it"
            )
        return None
    if trained and not choice:
        raise ModelError(
            "the adapter was trained on a base in 4 bits: which one is it merged into?",
            why="original: the base's own weights, which the adapter never saw; nearer to the base elsewhere.\n"
            "dequantized: the weights that it saw; answers as in training, with the rounding to 4 bits in all layers.\n"
            "docs/merge.md measures both",
            help="--quantized_base original, or --quantized_base dequantized",
        )
    if choice != "dequantized":
        return None
    dtype = hardware.dtype_of(trained.get("precision", "bf16"))
    return RoundTrip(recipe.get("bnb_4bit_quant_type", "nf4"), recipe.get("use_bnb_nested_quant", True), dtype)


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Raise ModelError where the folder holds anything, but for a merge that may be overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        is_merge = (folder / start.MERGE).is_file()
        if overwrite and is_merge:
            return
        raise ModelError(
            f"{folder} exists" + (" and is no merge" if overwrite else ""),
            why="nothing that existed is overwritten",
            help="another --output_dir" + (", or --overwrite to replace that merge" if is_merge else ""),
        )


@contextmanager
def work_folder(folder: Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
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
    if os.path.lexists(part) and start.MERGE not in names and names - {manifest.LOCK}:
        raise ModelError(f"{part} exists, and the work is done there", help="remove it")
    files.make_folder(part)
    try:
        lock = files.lock_file(part / manifest.LOCK)
    except (BlockingIOError, FileNotFoundError):  # or the other one has just ended
        raise ModelError(
            f"another process is merging into {folder}", help="wait for it or end it, or another --output_dir"
        ) from None
    with lock:
        try:
            for file in part.iterdir():  # what a merge left that was killed
                if file.name != manifest.LOCK:
                    files.remove(file)
            (part / start.MERGE).write_text('{"status": "merging"}\n', encoding="utf-8")
            free = shutil.disk_usage(folder.parent).free
            if free < needed + 2**26:  # 64 MiB for the tokenizer and the other small files
                raise ModelError(
                    f"{needed / 1e9:.1f} GB are needed in {folder.parent}, and {free / 1e9:.1f} GB are free",
                    help="make room, another --output_dir, or --dtype bf16 where it is fp32",
                )
            yield part
            if sys.platform == "win32":
                lock.release()  # an open file cannot be removed there, nor its folder be moved
            (part / manifest.LOCK).unlink()
            check_output(folder, overwrite)  # something may lie there by now
            if (folder / start.MERGE).is_file():
                os.replace(folder, old)
            os.replace(part, folder)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(part)
            raise


def push(folder: Path, name: str) -> str:
    """Upload the folder to the hub as a private model; returns its address.

    Raises:
        ModelError: no network, no token, or the hub refuses. The folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client raises its own, httpx's and OSErrors
        raise ModelError(
            f"{folder} is merged, and could not be pushed to {name}",
            why=first_line(error),
            help=f"hf auth login, then: {console.quote_for_shell('hf', 'upload', name, folder)}",
        ) from None
    return address
