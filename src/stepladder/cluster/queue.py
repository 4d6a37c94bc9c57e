"""Queue a run, or a sweep with its report: check the recipe, plan its memory, and give one sbatch command to Slurm.

No shell is in between. torch is loaded only where the GPUs' type is known, to plan what each will hold.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

from stepladder import console, hardware, installation
from stepladder.cluster import job, local_sweep, staging
from stepladder.cluster.sweep import Rung, Sweep, read_sweep
from stepladder.console import quote_for_shell
from stepladder.data import mixture, templates
from stepladder.errors import LaunchError
from stepladder.hardware import CORES_PER_GPU, GIB, MEMORY_PER_GPU
from stepladder.model import adapter_recipe
from stepladder.training import arguments
from stepladder.training.launch import launcher

SBATCH_NAMES = ("time", "partition", "account", "qos", "constraint", "exclude", "reservation")
CPUS = 4  # of a rank without a GPU
SLOWER = 1.05  # what the plan's best must win to be named
PATIENCE = 30  # seconds that Slurm may take to tell what its nodes have
# What Slurm's names, times and counts are made of; an option can then not become two.
NAME = re.compile(r"[\w.,:@+%\[\]&|*()-]+")


def submit(args: argparse.Namespace, overrides: list[str]) -> None:
    """Check, plan and queue what submit.py is asked for; with `--dry_run` print the command and the script instead.

    Args:
        args: submit.py's flags.
        overrides: keys of the recipe, as words of a command line.

    Raises:
        StepladderError: the recipe is wrong, does not fit the GPUs, or is refused by Slurm.
    """
    for name in ("cpus_per_gpu", "mem_per_gpu", "gpu_memory"):
        if getattr(args, name) and not args.gpus:
            raise LaunchError(f"--{name} without GPUs", where="command line", help="--gpus N, or --cpus, --mem")
    sweep = read_sweep(args.sweep) if args.sweep else None
    runs = sweep.runs if sweep else [["--recipe", args.recipe]]
    # Every run of a sweep is checked before the first of them waits in the queue.
    strategies = sorted({_check(words + overrides, args) for words in runs})
    rungs = [sweep.rungs(job.recipe_of(words + overrides)) for words in runs] if sweep else []
    if args.here:
        _run_here(sweep, rungs, args, overrides)
        return
    share = gpu_share(args.gpus, args.partition) if args.gpus else None
    plan, need = _plan(runs, args, overrides, share[1] if share and not _asks_for_memory(args) else 0)
    if "auto" in strategies:
        strategies = [args.strategy]
    folder = sweep.folder if sweep else job.recipe_of([*runs[0], *overrides]).output_dir
    resources = _resources(args, share, need)
    if sweep:
        log, script = "slurm-%A_%a.out", "slurm/sweep.sbatch"
        words = [[str(sweep.file), *(["--rung", str(rung.number)] if sweep.halving else [])] for rung in rungs[0]]
        names = [f"--array=0-{rung.runs - 1}" for rung in rungs[0]]
    else:
        log, script, words = "slurm-%j.out", "slurm/sft.sbatch", [["--recipe", args.recipe]]
        names = [f"--job-name={''.join(sign if sign.isalnum() or sign in '-_.' else '_' for sign in folder.name)}"]
    if not Path(script).is_file():
        raise LaunchError(
            f"there is no {script} here",
            why="a job runs in the folder that it is submitted from, and its templates are yours to adapt",
            help="stepladder init DIR makes a folder with them; or submit from a clone of Stepladder",
        )
    site, sites = os.environ.get("STEPLADDER_SITE"), sorted(file.stem for file in Path("slurm/sites").glob("*.sh"))
    if site and site not in sites:  # as environment.sh does once the job has begun
        raise LaunchError(f"STEPLADDER_SITE={site}: no such file in slurm/sites/", help=" ".join(sites))
    common = [*(["--strategy", args.strategy] if args.strategy else []), *overrides]
    log = f"--output={log_pattern(folder, log)}"
    jobs = [[*resources, name, log, script, *own, *common] for name, own in zip(names, words, strict=True)]
    if args.dry_run:
        lines = [quote_for_shell("sbatch", *jobs[0])]
        lines += [quote_for_shell("sbatch", "--dependency=afterany:JOB", *one) for one in jobs[1:]]
        print(
            "".join(f"# {line}\n" for line in [*plan.splitlines(), *lines])
            + f"\n{Path(script).read_text(encoding='utf-8')}"
        )
        return
    if plan:
        print(plan)
    _queue(jobs, sweep, folder, f"{', '.join(strategies)} on {args.nodes} node{'s' * (args.nodes > 1)}")


def _run_here(sweep: Sweep | None, rungs: list[list[Rung]], args: argparse.Namespace, overrides: list[str]) -> None:
    """Train a sweep on this machine; with `--dry_run` print the commands of its first rung.

    Raises:
        LaunchError: it is no sweep, or a flag is set that only Slurm has a use for.
        StepladderError: as `local_sweep.run_sweep`.
    """
    if sweep is None:
        raise LaunchError(
            "--here is for a sweep", where="command line", help=f"{installation.command('sft')} trains one recipe"
        )
    for name in ("gpus", "gpu", "gpu_memory", "cpus", "cpus_per_gpu", "mem", "mem_per_gpu", *SBATCH_NAMES):
        if getattr(args, name):
            raise LaunchError(
                f"--{name} with --here",
                where="command line",
                why="it asks Slurm for resources, and --here runs without it",
                help=f"remove --{name}; --ranks sets the processes of a run",
            )
    if args.nodes > 1:
        raise LaunchError("--nodes with --here", where="command line", help="--ranks sets the processes of a run")
    strategy = launcher.find_strategy(args.strategy, 1, args.ranks)
    if args.dry_run:
        for words in sweep.runs:
            command = local_sweep.launch_command([*words, *overrides], strategy, args.ranks)
            print(quote_for_shell("python", *command[1:]))
        return
    local_sweep.run_sweep(sweep, rungs[0], strategy, args.ranks, overrides)


def _queue(jobs: list[list[str]], sweep: Sweep | None, folder: Path, what: str) -> None:
    """Give the jobs to Slurm, one after the other, and a sweep's report last; print how to follow them."""
    print(sbatch(["--test-only", *jobs[0]]).splitlines()[-1])
    folder.mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and the job would fail without a word
    if sweep:
        for rung in range(len(jobs)):  # of an earlier submission
            sweep.decision(rung).unlink(missing_ok=True)
    numbers: list[str] = []
    for words in jobs:
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        numbers.append(sbatch(["--parsable", *after, *words]).split(";")[0])
    print(f"✔ job {numbers[0]}: {what}")
    print(f"  log     {folder}/slurm-{numbers[0]}{'_N' if sweep else ''}.out, and one of each node beside it")
    stop = f"; to let it end at the next preemption: touch {quote_for_shell(folder)}/stop"
    if sweep:
        stop = ""
        for number in numbers[1:]:
            print(f"  then    job {number}: the best of the one before, to a later step")
        report = ["--parsable", f"--dependency=afterany:{numbers[-1]}", "--job-name=report",
                  f"--output={log_pattern(folder, 'slurm-%j.out')}", "slurm/script.sbatch", "report",
                  "--sweep", str(sweep.file)]  # fmt: skip
        print(f"  report  job {sbatch(report)}, when all have ended: {folder}/report.html")
    print(f"  follow  squeue --job {','.join(numbers)};  tail -F {quote_for_shell(folder)}/slurm-{numbers[0]}*.out")
    print(f"  cancel  scancel {' '.join(numbers)}{stop}")


def _check(words: list[str], args: argparse.Namespace) -> str:
    """Load the recipe as the job will, for the ranks that it will have; returns the strategy's name."""
    recipe = job.recipe_of(words)
    staging.check_stage(recipe)
    recipe = adapter_recipe.settle(recipe)
    gpus = (args.gpus or "").rpartition(":")[2]
    ranks = int(gpus) if gpus.isdecimal() else args.ranks  # of a node
    arguments.layout(recipe, args.nodes * ranks)
    mixture.load(recipe)
    templates.check_path(recipe)
    asked = args.strategy or dict(itertools.pairwise(words)).get("--strategy")
    return "auto" if asked == "auto" else launcher.find_strategy(asked, args.nodes, ranks)


def _resources(args: argparse.Namespace, share: tuple[int, int] | None, need: float) -> list[str]:
    """sbatch's options for nodes, GPUs, cores and memory, and those that submit.py passes on.

    With GPUs, cores and memory are asked for with each: what was asked for, else the share of a node, else what the
    plan needs. Slurm refuses --cpus-per-task with --cpus-per-gpu, and --mem with --mem-per-gpu.
    """
    values = {
        "nodes": args.nodes,
        "gpus_per_node": args.gpus,
        "ntasks_per_node": None if args.gpus else args.ranks,
        "cpus_per_task": args.cpus or (None if args.gpus else CPUS),
        "mem": args.mem,
        **{name: getattr(args, name) for name in SBATCH_NAMES},
    }
    if args.gpus:
        cores, memory = args.cpus_per_gpu, args.mem_per_gpu
        if not cores and not args.cpus and "SBATCH_CPUS_PER_GPU" not in os.environ:
            cores = min(CORES_PER_GPU, share[0] if share else CORES_PER_GPU) or None
        if not _asks_for_memory(args):
            most = share[1] if share else max(math.ceil(need), MEMORY_PER_GPU)
            memory = f"{most}G" if most else None
        values |= {"cpus_per_gpu": cores, "mem_per_gpu": memory}
    return sbatch_options(values)


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
    name = args.gpu or (kind if hardware.gpu_by_short_name(kind) else hardware.COMMON if args.gpu_memory else None)
    auto = args.strategy == "auto"
    if not name or not count.isdecimal():
        if auto:
            fault = "--strategy auto needs to know the GPUs"
            raise LaunchError(fault, where="command line", help="--gpus h100:4, --gpu h100, or --gpu_memory GiB")
        return "", 0.0
    if auto and args.sweep:
        raise LaunchError("--strategy auto is for one run", where="command line", help="--strategy zero3")
    console.quiet_libraries()
    from stepladder.planning import choose

    device = hardware.device(name, args.gpu_memory)
    lines, need = [], 0.0
    for words in runs:
        recipe = job.recipe_of(words + overrides)
        plan = choose.Plan(recipe, args.nodes, int(count), device)
        candidates = plan.candidates()
        if share:
            candidates = [one for one in candidates if choose.host_bytes(plan, one) <= share * GIB] or candidates
        best = plan.best(candidates)
        if best is None:
            raise choose.no_fit_error(plan, candidates)
        if auto:
            pick, args.strategy = best, best.strategy
            overrides += best.keys
        else:
            pick = plan.of_recipe(launcher.find_strategy(args.strategy, args.nodes, int(count)))
        lines.append(f"plan: {pick.strategy}, {pick.batch}: {pick.gib} of each {device.name}")
        if (times := best.tokens_per_second / pick.tokens_per_second) > SLOWER:
            lines[-1] += (
                f"\n      {best.strategy}, {best.batch} is {times:.1f} times as fast by the plan: --strategy auto"
            )
        if not pick.fits:
            raise LaunchError(
                f"it does not fit: {lines[-1].splitlines()[0]}",
                why="an estimate (docs/planning.md): the job would wait in the queue, then run out of memory",
                help=f"--strategy auto: {best.strategy} with micro-batch {best.micro}; or sbatch, without a plan",
            )
        need = max(need, host := choose.host_bytes(plan, pick) / GIB)
        if 0 < share < host:
            raise LaunchError(
                f"{pick.strategy} takes {host:.0f} GiB of host memory per rank, and a GPU's share of a node is {share}",
                why="each rank's own: weights that it loads in fp32, what is offloaded, a CUDA process's 4 GiB",
                help="--strategy zero3, which loads the weights once; or --mem_per_gpu with what your nodes have",
            )
    return lines[0], need


def sbatch_options(values: dict[str, str | int | None]) -> list[str]:
    """sbatch's options from submit.py's values; None leaves one out.

    Raises:
        LaunchError: a value that is no name, number or time.
    """
    options = []
    for name, value in values.items():
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if not NAME.fullmatch(str(value)):
            raise LaunchError(f"{flag} {value!r} is no name, number or time that Slurm knows", where="command line")
        options.append(f"{flag}={value}")
    return options


def gpu_share(gpus: str, partition: str | None) -> tuple[int, int] | None:
    """The share of a node that comes with one of its GPUs: cores, and GiB of memory (0 where Slurm was not told).

    Each the smallest among the partition's nodes that have so many GPUs; None where Slurm names no such node.

    Args:
        gpus: those of a node that the job asks for: `8` or `h100:8`.
        partition: as for sbatch; its default where there is none.
    """
    kind, _, count = gpus.rpartition(":")
    names = partition or os.environ.get("SBATCH_PARTITION") or ""
    if not names:
        names = ",".join(
            word[:-1] for word in _ask_slurm("sinfo", "--noheader", "--format=%P").split() if word[-1] == "*"
        )
    shares = []
    for node in _ask_slurm("scontrol", "--oneliner", "show", "node").splitlines():
        if names and not {*names.split(",")} & {*_field(node, "Partitions").split(",")}:
            continue
        # gpu:h100:4(S:0-1),gpu:a100_1g.10gb:7
        found = re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)", _field(node, "Gres"))
        if sum(int(number) for name, number in found if not kind or name == kind) < int(count):
            continue
        every = sum(int(number) for _, number in found)
        cores, memory, system = (
            int(_field(node, name, r"\d+") or 0) for name in ("CPUTot", "RealMemory", "MemSpecLimit")
        )
        cores = int(_field(node, "CPUEfctv", r"\d+") or cores)  # without those that are the system's own
        shares.append((cores // every, max(0, memory - system) // every >> 10))
    if not shares:
        return None
    return min(cores for cores, _ in shares), min(memory for _, memory in shares)


def _field(node: str, name: str, pattern: str = r"\S+") -> str:
    found = re.search(rf"(?:^| ){name}=({pattern})", node)
    return found[1] if found else ""


def _ask_slurm(*command: str) -> str:
    """What a command of Slurm prints; nothing where it cannot."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def log_pattern(folder: Path, name: str) -> str:
    """A file name as sbatch takes it, which reads `%` and a backslash as its own."""
    if "\\" in str(folder) or any(ord(sign) < 32 for sign in str(folder)):
        raise LaunchError(f"output_dir {str(folder)!r} cannot hold a job's log", help="another --output_dir")
    return f"{str(folder).replace('%', '%%')}/{name}"


def sbatch(words: list[str]) -> str:
    """Give words to sbatch; returns what it printed.

    Raises:
        LaunchError: there is no Slurm here, or it refuses, with its own words.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("there is no sbatch here", help="run it on your cluster's login node, or --dry_run")
    done = subprocess.run(["sbatch", *words], capture_output=True, encoding="utf-8")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace("sbatch: error: ", "").replace("allocation failure: ", "")
        raise LaunchError(
            f"Slurm refuses the job: {' '.join(said.split())}",
            why=quote_for_shell("sbatch", *words),
            help="sinfo shows the partitions with their limits, sacctmgr show assoc your accounts",
        )
    return (done.stdout + done.stderr).strip()
