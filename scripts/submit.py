"""Check a recipe, then queue it: one job, or a sweep with its report.

    python scripts/submit.py --recipe qlora --strategy zero3 --nodes 2 --gpus 4 --time 04:00:00
    python scripts/submit.py --recipe models/qwen3-8b/full --strategy auto --gpus h100:8
    python scripts/submit.py --recipe lora --nodes 1 --ranks 2 --max_steps 60 --dry_run
    python scripts/submit.py --sweep slurm/sweeps/lora_rank.yaml --gpus 1
    python scripts/submit.py --sweep slurm/sweeps/lora_rank.yaml --here

Any key of the recipe can be set, as for sft.py. Runs on a login node, without a GPU; torch is loaded only if the
GPU type is known, to plan the memory (docs/planning.md). --dry_run prints the command and the script, and submits
nothing. docs/slurm.md describes what the templates in slurm/ need of your cluster.
"""

from stepladder import errors, flags
from stepladder.cluster import queue


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a path, or a name under recipes/")
    what.add_argument("--sweep", type=flags.path, help="a grid, such as slurm/sweeps/lora_rank.yaml")
    parser.add_argument("--strategy", help="a file in accelerate_configs/ (ddp; single for one rank), or auto")
    parser.add_argument("--nodes", type=flags.count, default=1)
    parser.add_argument("--gpus", type=flags.gpus, metavar="[TYPE:]N", help="GPUs per node")
    parser.add_argument("--gpu", metavar="NAME", help="GPU type for the plan, if Slurm's does not name it: h100 …")
    flags.add_gpu_memory(parser)
    parser.add_argument("--ranks", type=flags.count, default=1, help="ranks per node, without GPUs (1)")
    cores = parser.add_mutually_exclusive_group()
    cores.add_argument("--cpus", type=flags.count, help="cores per rank without GPUs (4), or per node with GPUs")
    cores.add_argument("--cpus_per_gpu", "--cpus-per-gpu", type=flags.count, help="8, or a GPU's share if less")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--mem", type=flags.memory, help="memory per node, as for sbatch")
    memory.add_argument(
        "--mem_per_gpu", "--mem-per-gpu", type=flags.memory, metavar="SIZE", help="48G … (default: a GPU's share)"
    )
    for name in queue.SBATCH_NAMES:
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument("--here", action="store_true", help="train a sweep on this machine, without Slurm")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the job, and submit nothing")
    queue.submit(*parser.parse_known_args())


if __name__ == "__main__":
    errors.exit_with(main)
