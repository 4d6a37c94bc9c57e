"""Plan a run without a GPU or weights: the memory of each rank, whether it fits, and the command to use.

    python scripts/plan.py --recipe models/llama-3.1-8b/lora --gpus 1 --gpu 4090
    python scripts/plan.py --recipe models/qwen3-8b/full --nodes 2 --gpus 8 --gpu h100 --json
    python scripts/plan.py --recipe models/llama-3.1-8b/full --gpu h100 --scale 8,64,512

Any key of the recipe can be set on the command line, as for sft.py. How it is computed, and how
accurate it is: docs/planning.md. Exit code 0: a plan fits; 2: none does, or the input is wrong.
"""

from stepladder import console, errors, flags, hardware
from stepladder.model import adapter_recipe, start
from stepladder.recipe import load


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--recipe", required=True, help="a path, or a name under recipes/")
    parser.add_argument("--nodes", type=flags.count, default=1)
    parser.add_argument("--gpus", type=flags.count, default=8, help="GPUs per node (default: 8)")
    parser.add_argument(
        "--gpu", default=hardware.COMMON, metavar="NAME", help="h100 a100-64 gh200 mi250x l40s 4090 … (default: h100)"
    )
    flags.add_gpu_memory(parser)
    parser.add_argument(
        "--host_memory",
        "--host-memory",
        type=flags.above_0,
        metavar="GiB",
        help="host memory per node; checked if set",
    )
    parser.add_argument("--strategy", help="only this one: single ddp zero2 zero3 fsdp …")
    parser.add_argument("--scale", metavar="8,64,512", help="predict the scaling to these numbers of GPUs")
    parser.add_argument("--parts", action="store_true", help="split the peaks: weights, gradients, …")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args, overrides = parser.parse_known_args()
    recipe = load.load(args.recipe, overrides)
    if start.resolve_recipe_model(recipe).adapter:  # other models need not be here
        recipe = adapter_recipe.settle(recipe)
    device = hardware.device(args.gpu, args.gpu_memory)

    console.quiet_libraries()
    with console.quick_imports():
        from stepladder.planning import plan_tables

    plan_tables.print_plan(args, overrides, recipe, device)


if __name__ == "__main__":
    errors.exit_with(main)
