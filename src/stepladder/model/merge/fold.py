"""A whole merge, as scripts/merge.py is told to do it: opened, proved, written beside its place, and described."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import console, files, hardware, run
from stepladder.errors import ModelError
from stepladder.model import card, fingerprint, gguf_file, load, portable, start
from stepladder.model.adapter_config import configs
from stepladder.model.merge import export, full, quantized, weights
from stepladder.model.merge.proof import Proof
from stepladder.model.merge.streamed import Merge

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
    work: Merge | full.Whole
    because: str | None  # why it is not streamed
    modelfile: str  # Ollama's; empty where it is not asked for
    gguf: gguf_file.File | None
    gguf_name: str


def _parts(args: argparse.Namespace) -> _Parts:
    config = configs(args.adapter)[0]
    made = [card.read(folder) for folder in args.adapter]
    trained, losses = made[0]
    in_4_bits = next((each for each, _ in made if each.get("recipe", {}).get("load_in_4bit")), trained)
    quantize = quantized.choose(args.quantized_base, in_4_bits)
    begun = start.of(str(args.adapter[0]))
    name = args.base or begun.base
    base = load.unquantized(name, None if args.base else config.revision)
    if replaced := next(
        (f for f in (base, *args.adapter) if f.resolve().is_relative_to(args.output_dir.resolve())), None
    ):
        raise ModelError(
            f"--output_dir {args.output_dir} holds {replaced}, which is merged",
            why="the result would take its place",
            help="another --output_dir",
        )
    tokenizer = load.tokenizer_of(str(args.adapter[0] if begun.has_tokenizer else base))
    defaults = base / "generation_config.json"
    generation = files.read_object(defaults) if defaults.is_file() else {}  # `load.unquantized` has looked at it
    generation["eos_token_id"] = load.end_tokens(tokenizer, generation.get("eos_token_id"))
    gguf_name = f"{args.output_dir.name}-{args.gguf}.gguf" if args.gguf else "."
    modelfile = export.modelfile(tokenizer, generation, gguf_name) if args.ollama else ""
    work, because = full.open_merge(base, args.adapter, args.weights, quantize, len(tokenizer), args.device)
    if because:
        console.warn(f"note: the whole model is loaded, in fp32: {because}")
    model = work.configuration()
    if args.ollama and not args.gguf:
        export.check_ollama((model.architectures or ["this model"])[0])
    gguf = gguf_file.File(model, tokenizer, generation["eos_token_id"], args.gguf) if args.gguf else None
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
    dtype = hardware.dtype_of(args.dtype) if args.dtype else weights.dtype(work.disk)
    plan = work.plan(dtype)
    needed = _bytes(plan) + (parts.gguf.bytes(plan) if parts.gguf else 0)
    with weights.beside(args.output_dir, needed, args.overwrite) as folder:
        check = None if args.no_verify else Proof(work, prompts(parts.tokenizer))
        facts = _write(args, parts, folder, dtype, check)
        facts["seconds"] = round(time.perf_counter() - began, 1)
        facts["peak_memory_bytes"] = hardware.peak_resident_bytes()
        files.write_whole(folder / "merge.json", json.dumps(facts, indent=2) + "\n")
        if parts.modelfile:
            files.write_whole(folder / "Modelfile", parts.modelfile)
        licence = card.front_matter(parts.base).get("license")
        text = card.card(args.output_dir, parts.name, licence, parts.trained, parts.losses, facts)
        files.write_whole(folder / "README.md", text)
    return facts


def _write(
    args: argparse.Namespace, parts: _Parts, folder: Path, dtype: torch.dtype, check: Proof | None
) -> dict[str, Any]:
    """Write weights, tokenizer and GGUF file, and compare them; returns merge.json without its totals."""
    writing = time.perf_counter()
    shards = parts.work.write(folder, dtype, args.max_shard_size, _show_progress)
    seconds = time.perf_counter() - writing
    load.save_tokenizer(parts.tokenizer, parts.base, folder)
    remarks = [note for path in args.adapter if (note := fingerprint.other_base(path, str(parts.base)))]
    remarks += portable.settle(folder, parts.tokenizer) + (parts.gguf.remarks if parts.gguf else [])
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    return {
        "status": "proved" if check else "unverified",
        "base": parts.name,
        "adapters": [str(path) for path in args.adapter],
        "weights": args.weights,
        "quantized_base": args.quantized_base,
        "dtype": weights.name_of(dtype),
        "streamed": parts.because is None,
        "bytes": _bytes(parts.work.plan(dtype)),
        "shards": shards,
        "merge_seconds": round(seconds, 1),
        "proof": check.compare(folder, dtype) if check else None,
        "remarks": remarks,
        "gguf": parts.gguf.written(folder, parts.gguf_name, check) if parts.gguf else None,
        "ollama": bool(parts.modelfile),
        "packages": run.package_versions(),
        "command": console.quoted(*sys.argv),
    }


def _bytes(plan: dict[str, weights.Tensor]) -> int:
    return sum(tensor.bytes for tensor in plan.values())


def _show_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        console.redraw(f"  merging {done / 1e9:.2f} of {total / 1e9:.2f} GB" + "\n" * (done == total))
