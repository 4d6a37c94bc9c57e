"""Check a recipe, then queue it: one job, or a sweep with its report.

    python scripts/submit.py --recipe qlora --strategy zero3 --nodes 2 --gpus 4 --time 04:00:00
    python scripts/submit.py --recipe models/qwen3-8b/full --strategy auto --gpus h100:8
    python scripts/submit.py --recipe lora --nodes 1 --ranks 2 --max_steps 60 --dry_run
    python scripts/submit.py --sweep slurm/sweeps/lora_rank.yaml --gpus 1

Any key of the recipe can be set, as for sft.py. Runs on a login node, without a GPU; torch is loaded only where the
GPUs' type is known, to plan what each will hold (docs/planning.md). --dry_run prints the command and the script, and
submits nothing. What the templates in slurm/ need of your cluster is in docs/slurm.md.
"""

import argparse
import itertools
import math
import os
from pathlib import Path

from stepladder import console, errors, flags
from stepladder.cluster import job, submit, sweep
from stepladder.data import mixture, templates
from stepladder.hardware import CORES_PER_GPU, GPUS, MEMORY_PER_GPU
from stepladder.model import adapter_recipe
from stepladder.training import arguments
from stepladder.training.launch import launcher

SBATCH_NAMES = ("time", "partition", "account", "qos", "constraint", "exclude", "reservation")


CPUS = 4  # of a rank without a GPU
SLOWER = 1.05  # what the plan's best must win to be named


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a path, or a name under recipes/")
    what.add_argument("--sweep", type=Path, help="a grid, such as slurm/sweeps/lora_rank.yaml")
    parser.add_argument("--strategy", help="a file in accelerate_configs/ (ddp; single for one rank), or auto")
    parser.add_argument("--nodes", type=flags.count, default=1)
    parser.add_argument("--gpus", type=flags.gpus, metavar="[TYPE:]N", help="a node")
    parser.add_argument("--gpu", metavar="NAME", help="h100, a100-40 …: where Slurm's type does not say it")
    parser.add_argument("--ranks", type=flags.count, default=1, help="a node, where there are no GPUs (1)")
    cores = parser.add_mutually_exclusive_group()
    cores.add_argument("--cpus", type=flags.count, help="a rank without GPUs (4), or the node's in all")
    cores.add_argument("--cpus_per_gpu", "--cpus-per-gpu", type=flags.count, help="8, or a GPU's share if it is less")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--mem", type=flags.memory, help="a node, as for sbatch")
    memory.add_argument(
        "--mem_per_gpu", "--mem-per-gpu", type=flags.memory, metavar="SIZE", help="48G …; else a GPU's share"
    )
    for name in SBATCH_NAMES:
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the script and submit nothing")
    args, overrides = parser.parse_known_args()

    for name in ("cpus_per_gpu", "mem_per_gpu"):
        if getattr(args, name) and not args.gpus:
            raise errors.LaunchError(f"--{name} without GPUs", where="command line", help="--gpus N, or --cpus, --mem")

    runs = sweep.elements(args.sweep) if args.sweep else [["--recipe", args.recipe]]
    strategies = set()
    for words in runs:  # every element of a sweep is checked before the first of them waits in the queue
        strategies.add(_check(words + overrides, args))
    share = submit.per_gpu(args.gpus, args.partition) if args.gpus else None
    planned, need = _plan(runs, args, overrides, share[1] if share and not _asks_for_memory(args) else 0)
    if "auto" in strategies:
        strategies = {args.strategy}
    options = submit.options(
        {
            "nodes": args.nodes,
            "gpus_per_node": args.gpus,
            "ntasks_per_node": None if args.gpus else args.ranks,
            "cpus_per_task": args.cpus or (None if args.gpus else CPUS),
            "mem": args.mem,
            **{name: getattr(args, name) for name in SBATCH_NAMES},
            **(_of_each_gpu(args, share, need) if args.gpus else {}),
        }
    )
    if args.sweep:
        folder = Path(sweep.folders(args.sweep)[0]).parent
        log, script = "slurm-%A_%a.out", ["slurm/sweep.sbatch", str(args.sweep)]
        options.append(f"--array=0-{len(runs) - 1}")
    else:
        folder = job.recipe_of([*runs[0], *overrides]).output_dir
        log, script = "slurm-%j.out", ["slurm/sft.sbatch", "--recipe", args.recipe]
        options.append(f"--job-name={_job_name(folder)}")
    script += ["--strategy", args.strategy] if args.strategy else []
    command = ["sbatch", *options, f"--output={submit.log_pattern(folder, log)}", *script, *overrides]
    if args.dry_run:
        said = "".join(f"# {line}\n" for line in [*planned.splitlines(), console.quoted(*command)])
        print(f"{said}\n{Path(script[0]).read_text()}")
        return

    if planned:
        print(planned)
    print(submit.sbatch([command[0], "--test-only", *command[1:]]).splitlines()[-1])
    folder.mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and the job would fail without a word
    number = submit.sbatch([command[0], "--parsable", *command[1:]]).split(";")[0]
    print(f"✔ job {number}: {', '.join(sorted(strategies))} on {args.nodes} node{'s' * (args.nodes > 1)}")
    print(f"  log     {folder}/slurm-{number}{'_N' if args.sweep else ''}.out, and one of each node beside it")
    if args.sweep:
        report = ["sbatch", "--parsable", f"--dependency=afterany:{number}", "--job-name=report",
                  f"--output={submit.log_pattern(folder, 'slurm-%j.out')}", "slurm/script.sbatch", "report.py",
                  *sweep.folders(args.sweep), "-o", str(folder / "report.html")]  # fmt: skip
        print(f"  report  job {submit.sbatch(report)}, when all have ended: {folder}/report.html")
    print(f"  follow  squeue --job {number};  tail -F {console.quoted(folder)}/slurm-{number}*.out")
    print(f"  cancel  scancel {number};  to let it end at the next preemption: touch {console.quoted(folder)}/stop")


def _of_each_gpu(args: argparse.Namespace, share: tuple[int, int] | None, need: float) -> dict[str, str | int | None]:
    """Cores and memory for each GPU: what was asked for, else the share of a node, else what the plan needs.

    Slurm refuses --cpus-per-task with --cpus-per-gpu, and --mem with --mem-per-gpu.
    """
    cores, memory = args.cpus_per_gpu, args.mem_per_gpu
    if not cores and not args.cpus and "SBATCH_CPUS_PER_GPU" not in os.environ:
        cores = min(CORES_PER_GPU, share[0] if share else CORES_PER_GPU) or None
    if not _asks_for_memory(args):
        most = share[1] if share else max(math.ceil(need), MEMORY_PER_GPU)
        memory = f"{most}G" if most else None
    return {"cpus_per_gpu": cores, "mem_per_gpu": memory}


def _asks_for_memory(args: argparse.Namespace) -> bool:
    set_before = any(f"SBATCH_MEM_PER_{of}" in os.environ for of in ("GPU", "CPU", "NODE"))
    return bool(args.mem or args.mem_per_gpu or set_before)


def _plan(runs: list[list[str]], args: argparse.Namespace, overrides: list[str], share: int) -> tuple[str, float]:
    """Whether the GPUs hold what they are asked for, in a line; `--strategy auto` becomes the fastest way that fits.

    Without a type that is known nothing is planned, and the line is empty.

    Args:
        share: GiB of host memory that come with a GPU; 0 where they are not known or others were asked for.

    Returns:
        The line, and the GiB of host memory that a rank needs (0 where they are not known).
    """
    kind, _, count = (args.gpus or "").rpartition(":")
    name = args.gpu or (kind if kind.lower() in {row.name for row in GPUS} else None)
    auto = args.strategy == "auto"
    if not name or not count.isdecimal():
        if auto:
            raise errors.LaunchError(
                "--strategy auto needs to know the GPUs", where="command line", help="--gpus h100:4, or --gpu h100"
            )
        return "", 0.0
    if auto and args.sweep:
        raise errors.LaunchError("--strategy auto is for one run", where="command line", help="--strategy zero3")
    console.quiet_libraries()
    from stepladder.planning import choose, hardware

    lines, need = [], 0.0
    for words in runs:
        recipe = job.recipe_of(words + overrides)
        plan = choose.Plan(recipe, args.nodes, int(count), hardware.device(name))
        ways = plan.ways()
        if share:
            ways = [way for way in ways if choose.host_bytes(plan, way) <= share * hardware.GIB] or ways
        best = plan.best(ways)
        if best is None:
            raise choose.nowhere(plan, ways)
        if auto:
            way, args.strategy = best, best.strategy
            overrides += ["--per_device_train_batch_size", str(best.micro)]
            overrides += ["--gradient_checkpointing", str(best.checkpointing).lower()]
        else:
            way = plan.of_recipe(launcher.find_strategy(args.strategy, plan.ranks))
        lines.append(
            f"plan: {way.strategy}, micro-batch {way.micro}, checkpointing {'on' if way.checkpointing else 'off'}: "
            f"{way.memory.total / hardware.GIB:.1f} of {way.limit / hardware.GIB:.1f} GiB of each {name}"
        )
        if (times := best.tokens_per_second / way.tokens_per_second) > SLOWER:
            lines[-1] += (
                f"\n      {best.strategy}, micro-batch {best.micro}, checkpointing "
                f"{'on' if best.checkpointing else 'off'} is {times:.1f} times as fast by the plan: --strategy auto"
            )
        if not way.fits:
            raise errors.LaunchError(
                f"it does not fit: {lines[-1].splitlines()[0]}",
                why="an estimate (docs/planning.md); the job would wait for its turn and run out of memory",
                help=f"--strategy auto: {best.strategy} with micro-batch {best.micro}; or sbatch, without a plan",
            )
        need = max(need, host := choose.host_bytes(plan, way) / hardware.GIB)
        if 0 < share < host:
            raise errors.LaunchError(
                f"{way.strategy} takes {host:.0f} GiB of host memory a rank, and a GPU's share of a node is {share}",
                why="each rank's own: weights that it loads in fp32, what is offloaded, a CUDA process's 4 GiB",
                help="--strategy zero3, which loads the weights once; or --mem_per_gpu with what your nodes have",
            )
    return lines[0], need


def _check(words: list[str], args: argparse.Namespace) -> str:
    """Load the recipe as the job will, for the ranks that it will have; returns the strategy's name."""
    recipe = adapter_recipe.settle(job.recipe_of(words))
    gpus = (args.gpus or "").rpartition(":")[2]
    ranks = args.nodes * (int(gpus) if gpus.isdecimal() else args.ranks)
    arguments.layout(recipe, ranks)
    mixture.load(recipe)
    templates.check_path(recipe)
    asked = args.strategy or dict(itertools.pairwise(words)).get("--strategy")
    return "auto" if asked == "auto" else launcher.find_strategy(asked, ranks)


def _job_name(folder: Path) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in folder.name)


if __name__ == "__main__":
    errors.exit_with(main)
