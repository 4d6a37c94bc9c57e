"""Fold an adapter into its base: streamed, proved, ready to serve.

    python scripts/merge.py --adapter runs/lora --output_dir merged/lora
    python scripts/merge.py --adapter runs/qlora --quantized_base dequantized --output_dir merged/qlora

No more than one module is in memory at a time, whatever the model's size. The merged model must answer
as base and adapter do, or nothing is written. What was done lies in OUT/merge.json and OUT/README.md.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from stepladder import console, errors, files, flags, run
from stepladder.data import prompts
from stepladder.model import card, fingerprint, gguf_file, injection, load, portable, start, weights

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapter", required=True, action="append", type=Path, help="its folder; several add up")
    parser.add_argument("--weights", type=flags.finite, nargs="+", help="one a --adapter (1 each)")
    parser.add_argument("--output_dir", "--output-dir", required=True, type=flags.folder)
    parser.add_argument("--overwrite", action="store_true", help="replace the merge that output_dir holds")
    parser.add_argument("--base", help="a folder or a hub id (the one that the adapter names)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights (the base's)")
    parser.add_argument("--quantized_base", "--quantized-base", choices=("original", "dequantized"))
    parser.add_argument("--max_shard_size", "--max-shard-size", type=_bytes, default="5GB", help="5GB, 500MB, …")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", help="rows for the proof: JSONL (the recipe's own)")
    parser.add_argument("--gguf", choices=gguf_file.KINDS, help="write a file for llama.cpp and Ollama, too")
    parser.add_argument("--ollama", action="store_true", help="write a Modelfile: ollama create NAME -f OUT/Modelfile")
    parser.add_argument("--push_to_hub", "--push-to-hub", metavar="ID", help="upload the result, as a private model")
    parser.add_argument("--no_verify", "--no-verify", action="store_true", help="write it unproved; the card says so")
    parser.add_argument("--json", action="store_true", help="print merge.json")
    args = parser.parse_args()
    weights.check_output(args.output_dir, args.overwrite)
    scales = args.weights or [1.0] * len(args.adapter)
    if len(scales) != len(args.adapter):
        raise errors.ModelError(f"{len(args.adapter)} adapters and {len(scales)} weights", way_out="one each")
    for folder in args.adapter:
        start.check_finished(folder)
        start.check_source(str(folder))

    console.quiet_libraries()
    with console.quick_imports():
        import peft  # noqa: F401 - it comes with the proof, and is most of what is imported
        import torch

        from stepladder.model import export, proof, quantized, whole

    console.quiet_progress_bars()
    began = time.perf_counter()
    config = injection.configs(args.adapter)[0]
    made = [card.read(folder) for folder in args.adapter]
    trained, losses = made[0]
    in_4_bits = next((each for each, _ in made if each.get("recipe", {}).get("load_in_4bit")), trained)
    quantize = quantized.choose(args.quantized_base, in_4_bits)
    name = args.base or start.of(str(args.adapter[0])).base
    base = load.unquantized(name, None if args.base else config.revision)
    if replaced := next(
        (f for f in (base, *args.adapter) if f.resolve().is_relative_to(args.output_dir.resolve())), None
    ):
        raise errors.ModelError(
            f"--output_dir {args.output_dir} holds {replaced}, which is merged",
            why="the result would take its place",
            way_out="another --output_dir",
        )
    licence = card.front_matter(base).get("license")
    moved = [note for folder in args.adapter if (note := fingerprint.other_base(folder, str(base)))]
    has_tokenizer = (args.adapter[0] / "tokenizer_config.json").is_file()
    tokenizer = load.tokenizer_of(str(args.adapter[0] if has_tokenizer else base))

    defaults = base / "generation_config.json"
    generation = files.read_object(defaults) if defaults.is_file() else {}  # `load.unquantized` has looked at it
    generation["eos_token_id"] = load.end_tokens(tokenizer, generation.get("eos_token_id"))
    file = f"{args.output_dir.name}-{args.gguf}.gguf" if args.gguf else "."
    ollama = args.ollama and export.modelfile(tokenizer, generation, file)
    work, because = whole.opened(base, args.adapter, scales, quantize, len(tokenizer), args.device)
    if because:
        console.warn(f"note: the whole model is loaded, in fp32: {because}")
    model = work.configuration()
    if args.ollama and not args.gguf:
        export.check_ollama((model.architectures or ["this model"])[0])
    gguf = gguf_file.File(model, tokenizer, generation["eos_token_id"], args.gguf) if args.gguf else None
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else weights.dtype(work.disk)
    size = sum(tensor.bytes for tensor in work.plan(dtype).values())
    needed = size + (gguf.bytes(work.plan(dtype)) if gguf else 0)
    with weights.beside(args.output_dir, needed, args.overwrite) as part:
        check = None
        if not args.no_verify:
            check = proof.Proof(work, prompts.token_ids(_rows(args), tokenizer))
        writing = time.perf_counter()
        shards = work.write(part, dtype, args.max_shard_size, _progress)
        seconds = time.perf_counter() - writing
        load.save_tokenizer(tokenizer, base, part)
        remarks = moved + portable.settle(part, tokenizer) + (gguf.remarks if gguf else [])
        for remark in remarks:
            print(f"note: {remark}", file=sys.stderr)
        facts = {
            "status": "proved" if check else "unverified",
            "base": name,
            "adapters": [str(folder) for folder in args.adapter],
            "weights": scales,
            "quantized_base": args.quantized_base,
            "dtype": str(dtype).removeprefix("torch."),
            "streamed": because is None,
            "bytes": size,
            "shards": shards,
            "merge_seconds": round(seconds, 1),
            "proof": check.compare(part, dtype) if check else None,
            "remarks": remarks,
            "gguf": gguf.written(part, file, check) if gguf else None,
            "ollama": bool(ollama),
            "packages": run.package_versions(),
            "command": console.quoted(*sys.argv),
        }
        facts["seconds"] = round(time.perf_counter() - began, 1)
        facts["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        run.write_whole(part / "merge.json", json.dumps(facts, indent=2) + "\n")
        if ollama:
            run.write_whole(part / "Modelfile", ollama)
        run.write_whole(part / "README.md", card.card(args.output_dir, name, licence, trained, losses, facts))
    if args.push_to_hub:
        console.say(f"pushed to {export.push(args.output_dir, args.push_to_hub)}")
    console.say(json.dumps(facts, indent=2) if args.json else proof.report(facts, args.output_dir))


def _rows(args: argparse.Namespace) -> list:
    """The rows whose prompts both models answer."""
    from stepladder.data.source import Source
    from stepladder.recipe import load as recipe_load

    if args.prompts:
        return prompts.of_source(Source(args.prompts))
    recipe = args.adapter[0] / run.RECIPE
    if not recipe.is_file():
        return prompts.built_in()
    try:
        return prompts.of_recipe(recipe_load.load(str(recipe), []))
    except errors.StepladderError as error:
        console.warn(f"note: the proof uses built-in prompts, the recipe's data cannot be read: {error.what}")
        return prompts.built_in()


def _bytes(size: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size[:-2], size[-2:].upper()
    if unit not in units or not number.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{size} is no size: 5GB, or 500MB")
    return flags.count(number) * units[unit]


def _progress(done: int, total: int) -> None:
    """A line on a terminal; each tenth in a log."""
    if sys.stdout.isatty():
        console.redraw(f"  merging {done / 1e9:.2f} of {total / 1e9:.2f} GB" + "\n" * (done == total))


if __name__ == "__main__":
    errors.exit_with(main)
