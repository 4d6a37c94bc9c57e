"""Merge an adapter into its base: streamed, verified, ready to serve.

    python scripts/merge.py --adapter runs/lora --output_dir merged/lora
    python scripts/merge.py --adapter A --adapter B --combination_type ties --density 0.5 --output_dir merged/both
    python scripts/merge.py --adapter runs/qlora --quantized_base dequantized --output_dir merged/qlora

Only one module is in memory at a time, whatever the model's size. If the merged model does not answer as
base and adapter do, nothing is written. OUT/merge.json and OUT/README.md describe the result.
"""

import argparse
import json

from stepladder import console, errors, flags, hardware, manifest
from stepladder.data import mixture
from stepladder.data.source import Source
from stepladder.evaluation import questions
from stepladder.model import start
from stepladder.model.merge import combination, fold, gguf_file
from stepladder.recipe import load as recipe_load


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument(
        "--adapter", required=True, action="append", type=flags.path, help="its folder; several are added"
    )
    combination.add_flags(parser)
    parser.add_argument("--output_dir", "--output-dir", required=True, type=flags.path)
    parser.add_argument("--overwrite", action="store_true", help="replace the merge that output_dir holds")
    parser.add_argument("--base", help="a folder or a hub id (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=hardware.DTYPES, help="of the merged weights (default: the base's)")
    parser.add_argument("--quantized_base", "--quantized-base", choices=("original", "dequantized"))
    parser.add_argument("--max_shard_size", "--max-shard-size", type=flags.size, default="5GB", help="5GB, 500MB, …")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", help="rows for the verification: JSONL (default: the recipe's)")
    parser.add_argument("--gguf", choices=gguf_file.KINDS, help="also write a file for llama.cpp and Ollama")
    parser.add_argument("--ollama", action="store_true", help="write a Modelfile: ollama create NAME -f OUT/Modelfile")
    parser.add_argument("--push_to_hub", "--push-to-hub", metavar="ID", help="upload the result, as a private model")
    parser.add_argument("--no_verify", "--no-verify", action="store_true", help="do not verify; the card says so")
    parser.add_argument("--json", action="store_true", help="print merge.json")
    args = parser.parse_args()
    fold.check_output(args.output_dir, args.overwrite)
    args.combination = combination.from_flags(args)
    for folder in args.adapter:
        start.check_finished(folder)
        start.check_source(str(folder))

    console.quiet_libraries()
    with console.quick_imports():
        import peft  # noqa: F401 - it comes with the proof, and is most of what is imported

        from stepladder.model.merge import proof

    console.quiet_progress_bars()
    facts = fold.merge(args, lambda tokenizer: questions.prompt_ids(_rows(args), tokenizer))
    if args.push_to_hub:
        console.say(f"pushed to {fold.push(args.output_dir, args.push_to_hub)}")
    console.say(json.dumps(facts, indent=2) if args.json else proof.report(facts, args.output_dir))


def _rows(args: argparse.Namespace) -> list:
    """The rows whose prompts both models answer."""
    if args.prompts:
        return questions.proof_rows(Source(args.prompts))
    recipe = args.adapter[0] / manifest.RECIPE
    if not recipe.is_file():
        return questions.built_in_rows()
    try:
        return questions.proof_rows(mixture.entries(recipe_load.load(str(recipe), []))[0].source)
    except errors.StepladderError as error:
        console.warn(f"note: the proof uses built-in prompts, the recipe's data cannot be read: {error.what}")
        return questions.built_in_rows()


if __name__ == "__main__":
    errors.exit_with(main)
