"""Fetch what a recipe takes from the hub into one folder, for machines that do not reach it.

    python scripts/stage.py --recipe models/llama-3.2-1b/lora --to /scratch/stage
    python scripts/stage.py --recipe lora --model_name_or_path Qwen/Qwen3-8B --to /scratch/stage --wheels

Run it where the hub is reached, copy the folder (rsync -a, scp -r), and set STEPLADDER_STAGE to it there:
scripts and jobs then read base model, tokenizer, template and data from it. The folder may serve several
recipes: each call adds what is missing. Any key of the recipe can be set on the command line, as for sft.py.
"""

from stepladder import errors, flags, installation
from stepladder.cluster import staging
from stepladder.console import quote_for_shell
from stepladder.recipe import load


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--recipe", required=True, help="a path, or a name under recipes/")
    parser.add_argument("--to", type=flags.path, required=True, metavar="DIR", help="the folder; created if missing")
    parser.add_argument("--wheels", action="store_true", help="also the packages of constraints.txt, for this Python")
    args, overrides = parser.parse_known_args()
    recipe = load.load(args.recipe, overrides)
    staging.fill(recipe, args.to, args.wheels)
    if local := staging.local_inputs(recipe):
        print(f"  not in it, copy them with Stepladder's folder: {', '.join(local)}")
    check = f"{installation.command('check')} {quote_for_shell('--recipe', args.recipe, *overrides)}"
    print(f"copy {args.to}, then: export STEPLADDER_STAGE=DIR; {check}")
    if args.wheels:
        print("install there, on the same Python and processor: PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR/wheels make install")


if __name__ == "__main__":
    errors.exit_with(main)
