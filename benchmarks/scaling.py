"""Two processes against one on the same cores, by strategy: tokens per second, communication, peak memory.

    python benchmarks/scaling.py --method lora --repeat 3

SmolLM2-135M on TechCo's rows, the recipe as it is, 8 rows a step. One process has both threads; of two, each has one.
`two, apart` are two processes with half the rows a step each and nothing to say to each other: what a strategy
takes longer than these is its communication (and, of ZeRO and FSDP, what they compute to shard).
Each is run in turn; a figure is the median of the steps after the first three, then of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = {"lora": "lora", "full": "sft", "qlora": "qlora"}
STEPS, SKIPPED = 9, 3
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")


def start(name: str, method: str, folder: Path, ranks: int, rows: int) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if ranks > 1:
        config = f"accelerate_configs/{name}.yaml"
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", config,
                    "--num_processes", str(ranks), "--main_process_port", "0"]  # fmt: skip
    words = [*launcher, "scripts/sft.py", "--recipe", RECIPE[method], "--output_dir", str(folder), "--overwrite"]
    words += ["--global_batch_size", str(rows), "--max_steps", str(STEPS), "--eval_strategy", "no"]
    threads = {} if name == "single" else {"SLURM_CPUS_ON_NODE": str(ranks)}  # by which the cores are shared out
    return subprocess.Popen([*words, "--save_strategy", "no"], cwd=ROOT, text=True, env=os.environ | threads,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def ended(process: subprocess.Popen[str], folder: Path) -> tuple[float, float, float]:
    """Tokens and seconds of a step, and the peak memory of all ranks in GiB."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"✘ {process.args}\n{output[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][SKIPPED:]
    peaks = json.loads((folder / "run.json").read_text())["totals"]["peak_memory_bytes"]
    rate, seconds = (statistics.median(row[key] for row in rows) for key in ("tokens_per_second", "step_seconds"))
    return rate, seconds, sum(peaks) / 2**30


def play(name: str, method: str, folder: Path) -> tuple[float, float, float]:
    if name == "two, apart":
        processes = [(start(name, method, folder / part, 1, 4), folder / part) for part in ("a", "b")]
        one, other = (ended(*process) for process in processes)
        return one[0] + other[0], max(one[1], other[1]), one[2] + other[2]
    return ended(start(name, method, folder / "run", 2 if name in STRATEGIES else 1, 8), folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=RECIPE, default="lora")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(args.repeat):
        for name in ("single", "two, apart", *STRATEGIES):
            with tempfile.TemporaryDirectory() as folder:
                runs.setdefault(name, []).append(play(name, args.method, Path(folder)))
            print(f"{name}: {runs[name][-1][0]:.0f} tokens/s", flush=True)
    found = {name: [statistics.median(run[at] for run in of) for at in range(3)] for name, of in runs.items()}
    print(f"\n{args.method}: {args.repeat} repetitions of {STEPS} steps, medians\n")
    print("| | tokens/s | × one process | beyond two apart | peak memory, all ranks, GiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (rate, seconds, memory) in found.items():
        beyond = f"{1 - found['two, apart'][1] / seconds:.0%} of a step" if name in STRATEGIES else ""
        print(f"| {name} | {rate:.0f} | {rate / found['single'][0]:.2f} | {beyond} | {memory:.1f} |")


if __name__ == "__main__":
    main()
