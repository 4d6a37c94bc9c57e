"""Check recipe, data, model, memory and launch before a run; or show where each value comes from and what it does.

    python scripts/check.py --recipe lora
    python scripts/check.py --recipe models/llama-3.1-8b/lora --gpus 8 --gpu h100 --strategy zero3
    python scripts/check.py --recipe models/qwen3-8b/lora --show --learning_rate 1e-4
    python scripts/check.py --recipe lora --explain
    python scripts/check.py --explain axolotl.yml
    python scripts/check.py --data data/techco.jsonl
    python scripts/check.py --recipe lora --audit
    python scripts/check.py --recipe lora --show 3

Without a view it checks versions, recipe, data, model, strategy, memory, disk and accounts, for this
machine or for the one that --gpus and --gpu describe. Any key of the recipe can be set on the command
line, as for sft.py. An Axolotl configuration is explained by its own key names. --audit checks the
rows that the recipe trains on, as text and as tokens; --show N also prints N of them, with the loss
tokens in colour.
Exit code 0: no errors; 2: the errors are printed.
"""

from stepladder import errors, flags, preflight


def main() -> int:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--recipe", help="a path, or a name under recipes/")
    view = parser.add_mutually_exclusive_group()
    shows = "print each key, its value and its source; with a number N: audit, and print N rows"
    view.add_argument("--show", nargs="?", const=preflight.SHOW_KEYS, metavar="N", help=shows)
    view.add_argument("--explain", action="store_true", help="print what each key that is set does")
    parser.add_argument("--audit", action="store_true", help="audit the recipe's data")
    parser.add_argument("--data", metavar="FILE", help="audit a file, folder or hub data set, without a recipe")
    parser.add_argument(
        "--min_input", "--min-input", type=flags.integer, metavar="N", help="shortest valid input, characters (10)"
    )
    parser.add_argument(
        "--min_output", "--min-output", type=flags.integer, metavar="N", help="shortest valid output, characters (20)"
    )
    parser.add_argument("--nodes", type=flags.count, default=1, help="nodes of the job (default: 1)")
    parser.add_argument("--gpus", type=flags.integer, metavar="N", help="GPUs per node (default: this machine's)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="GPU type, with --gpus: h100 a100 4090 t4 …")
    parser.add_argument("--strategy", metavar="NAME", help="a file of accelerate_configs/ (default: single or ddp)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return preflight.check(parser)


if __name__ == "__main__":
    errors.exit_with(main)
