"""Check a recipe, then queue it: one job, or a sweep with its report.

    python scripts/submit.py --recipe qlora --strategy zero3 --nodes 2 --gpus 4 --time 04:00:00
    python scripts/submit.py --recipe lora --nodes 1 --ranks 2 --max_steps 60 --dry_run
    python scripts/submit.py --sweep slurm/sweeps/lora_rank.yaml --gpus 1

Any key of the recipe can be set, as for sft.py. Runs on a login node: no GPU, no torch. --dry_run prints the
command and the script, and submits nothing. What the templates in slurm/ need of your cluster is in docs/slurm.md.
"""

import argparse
import itertools
import shlex
from pathlib import Path

from stepladder import errors
from stepladder.cluster import job, submit, sweep
from stepladder.data import mixture
from stepladder.model import load as model_load
from stepladder.training import arguments

SBATCH_NAMES = ("time", "partition", "account", "qos", "constraint", "exclude", "reservation", "mem")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a path, or a name under recipes/")
    what.add_argument("--sweep", type=Path, help="a grid, such as slurm/sweeps/lora_rank.yaml")
    parser.add_argument("--strategy", help="a file in accelerate_configs/ (ddp; single for one rank)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", metavar="[TYPE:]N", help="a node")
    parser.add_argument("--ranks", type=int, default=1, help="a node, where there are no GPUs (1)")
    parser.add_argument("--cpus", type=int, help="a rank without GPUs, or the node's in all (4)")
    for name in SBATCH_NAMES:
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the script and submit nothing")
    args, overrides = parser.parse_known_args()

    runs = sweep.elements(args.sweep) if args.sweep else [["--recipe", args.recipe]]
    strategies = set()
    for words in runs:  # every element of a sweep is checked before the first of them waits in the queue
        strategies.add(_check(words + overrides, args))
    options = submit.options(
        {
            "nodes": args.nodes,
            "gpus_per_node": args.gpus,
            "ntasks_per_node": None if args.gpus else args.ranks,
            "cpus_per_task": args.cpus,
            **{name: getattr(args, name) for name in SBATCH_NAMES},
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
        print(f"# {shlex.join(command)}\n\n{Path(script[0]).read_text()}")
        return

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
    print(f"  follow  squeue --job {number};  tail -F {shlex.quote(str(folder))}/slurm-{number}*.out")
    print(f"  cancel  scancel {number};  to let it end at the next preemption: touch {shlex.quote(str(folder))}/stop")


def _check(words: list[str], args: argparse.Namespace) -> str:
    """Load the recipe as the job will, for the ranks that it will have; returns the strategy's name."""
    recipe = job.recipe_of(words)
    gpus = (args.gpus or "").rpartition(":")[2]
    ranks = args.nodes * (int(gpus) if gpus.isdecimal() else args.ranks)
    arguments.layout(recipe, ranks)
    mixture.load(recipe)
    model_load.check_source(recipe.get("model_name_or_path"), recipe.where("model_name_or_path"))
    strategy = args.strategy or dict(itertools.pairwise(words)).get("--strategy")
    strategy = strategy or ("ddp" if ranks > 1 else "single")
    if not Path(f"accelerate_configs/{strategy}.yaml").is_file():
        there = ", ".join(sorted(file.stem for file in Path("accelerate_configs").glob("*.yaml")))
        raise errors.LaunchError(f"--strategy {strategy}: no accelerate_configs/{strategy}.yaml", way_out=there)
    return strategy


def _job_name(folder: Path) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in folder.name)


if __name__ == "__main__":
    errors.exit_with(main)
