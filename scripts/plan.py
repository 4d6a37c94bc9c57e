"""Before the queue, without a GPU or the weights: what each rank will hold, whether it fits, what to type.

    python scripts/plan.py --recipe models/llama-3.1-8b/lora --gpus 1 --gpu 4090
    python scripts/plan.py --recipe models/qwen3-8b/full --nodes 2 --gpus 8 --gpu h100 --json
    python scripts/plan.py --recipe models/llama-3.1-8b/full --gpu h100 --scale 8,64,512

Any key of the recipe can be set on the command line, as for sft.py. How it is computed, and how
far it is off: docs/planning.md. Exit code 0: a way fits; 2: none does, or the input is wrong.
"""

import argparse
import json

from stepladder import console, errors, flags
from stepladder.data import mixture, stream
from stepladder.model import adapter_recipe, start
from stepladder.planning import hardware
from stepladder.recipe import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, help="a path, or a name under recipes/")
    parser.add_argument("--nodes", type=flags.count, default=1)
    parser.add_argument("--gpus", type=flags.count, default=8, help="of each node (default: 8)")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="h100 a100 a100-40 l40s 4090 t4 … (default: h100)"
    )
    parser.add_argument(
        "--gpu_memory", "--gpu-memory", type=flags.above_0, metavar="GiB", help="for a GPU that has no name here"
    )
    parser.add_argument(
        "--host_memory",
        "--host-memory",
        type=flags.above_0,
        metavar="GiB",
        help="of each node: judged where it is given",
    )
    parser.add_argument("--strategy", help="only this one: single ddp zero2 zero3 fsdp …")
    parser.add_argument("--scale", metavar="8,64,512", help="how it would go on so many GPUs, on paper")
    parser.add_argument("--parts", action="store_true", help="what the peaks are made of: weights, gradients, …")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    args, overrides = parser.parse_known_args()
    recipe = load.load(args.recipe, overrides)
    if start.of_recipe(recipe).adapter:  # other models need not be here
        recipe = adapter_recipe.settle(recipe)
    device = hardware.device(args.gpu, args.gpu_memory)

    console.quiet_libraries()
    with console.quick_imports():
        from stepladder.planning import choose, report, scale

    if args.strategy not in (None, *choose.STRATEGIES):
        raise errors.LaunchError(
            f"unknown strategy '{args.strategy}'",
            where="command line --strategy",
            help=f"one of {', '.join(choose.STRATEGIES)}",
        )
    host = args.host_memory and args.host_memory * hardware.GIB
    plan = choose.Plan(recipe, args.nodes, args.gpus, device, host=host)
    if args.scale:
        micro, checkpointing = plan.one_micro_batch()
        points = scale.points(plan, scale.counts(args.scale), micro, checkpointing)
        if args.json:
            print(json.dumps({"scale": scale.as_json(points)}))
        else:
            scale.write(plan, points, micro, checkpointing, args.parts)
        return
    ways = plan.each(args.strategy) if args.strategy else plan.ways()
    best = plan.best(ways)
    steps = choose.steps(recipe, _rows(recipe), plan.rows)
    if args.json:
        rows = [choose.as_json(way) for way in ways]
        commands = choose.command(args.recipe, plan, best) if best else None
        chosen = choose.as_json(best) if best else None
        print(json.dumps({"ways": rows, "recommended": chosen, "commands": commands, "steps": steps}))
    else:
        report.write(plan, ways, best, steps, args.parts)
    if best is None:
        raise choose.nowhere(plan, ways)
    if not args.json:
        print("\n" + "\n".join(choose.command(args.recipe, plan, best)))


def _rows(recipe: load.Recipe) -> int | None:
    """How many rows the recipe trains on; None where they are not here, or nobody knows."""
    try:
        train = mixture.load(recipe)[0]
    except errors.DataError:
        return None
    return None if isinstance(train, stream.Stream) else len(train)


if __name__ == "__main__":
    errors.exit_with(main)
