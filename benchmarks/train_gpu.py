"""Tokens per second, MFU, peak memory and loss on a CUDA GPU with random weights, beside TRL, by turns.

    python benchmarks/train_gpu.py --folder /tmp/train-gpu --repeat 3
    python benchmarks/train_gpu.py --folder /tmp/train-gpu --rehearse    # a tiny model, on any machine: does it run?

Each trains ten steps of the same full rows; the figure is that of the last five. Nothing is downloaded. MFU counts
6 operations a parameter and token in full fine-tuning and 4 with LoRA, attention apart, of the data sheet's dense bf16
rate (watch/telemetry.py); recomputation is in the HFU only. No GPU was lent yet, so that this was only rehearsed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from plan_gpu import EIGHT, METHODS, REHEARSAL, ROOT, SMALL, Case, make_model, one_gpu, write_rows

STEPS, COUNTED = 10, 5
ONE = "meta-llama/Llama-3.2-1B-Instruct"
CASES = [
    Case(SMALL, "full", 8, 2048, False),
    Case(ONE, "full", 8, 2048, False),
    Case(ONE, "full", 2, 8192, False),
    Case(EIGHT, "lora", 4, 2048, True),
    Case(EIGHT, "lora", 1, 8192, True),
    Case(EIGHT, "qlora", 4, 2048, True),
]
# `trl sft` is this module, started by accelerate; here it says its peak as well.
TRL = """
import runpy, torch
runpy.run_module("trl.scripts.sft", run_name="__main__")
print("peak bytes:", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


@dataclass(frozen=True)
class Play:
    """What one run came to, of its last five steps; `mfu` is of ours alone, with the others it is in proportion."""

    rate: float  # tokens a second
    loss: float
    gib: float
    mfu: float = 0.0


def flags(case: Case, folder: Path) -> list[str]:
    """What all are told."""
    words = ["--model_name_or_path", str(make_model(case.model, folder)), *METHODS[case.method], "--bf16", "true"]
    words += ["--max_length", str(case.length), "--per_device_train_batch_size", str(case.micro)]
    words += ["--gradient_checkpointing", str(case.checkpointing).lower(), "--max_steps", str(STEPS)]
    words += ["--learning_rate", "1e-5", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    return [*words, "--report_to", "none", "--attn_implementation", "sdpa"]


def ours(case: Case, folder: Path) -> Play:
    run = folder / "ours"
    words = ["--recipe", "sft", *flags(case, folder), "--dataset_name", str(folder / "rows.jsonl"), "--overwrite"]
    words += ["--global_batch_size", str(case.micro), "--eval_dataset_name", "null", "--output_dir", str(run)]
    words += ["--dtype", case.dtype] if case.method != "qlora" else ["--dtype", "null"]
    done([sys.executable, "scripts/sft.py", *words])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-COUNTED:]
    peak = max(json.loads((run / "run.json").read_text())["totals"]["peak_memory_bytes"])
    rate, loss, mfu = (
        statistics.median(row.get(key, 0) for row in rows) for key in ("tokens_per_second", "loss", "mfu")
    )
    return Play(rate, loss, peak / 2**30, mfu)


def trl(case: Case, folder: Path, *more: str) -> Play:
    """By the clock on the lines that it prints."""
    words = [sys.executable, "-c", TRL, *flags(case, folder), "--dataset_name", str(folder / "trl")]
    words += ["--output_dir", str(folder / "theirs"), "--dtype", case.dtype]
    words += ["--gradient_accumulation_steps", "1", *more]
    found = done(words)
    losses = [(at, float(value[1])) for at, line in found if (value := re.search(r"'loss': '?([\d.]+)", line))]
    peak = next(int(line.split()[-1]) for _, line in found if line.startswith("peak bytes:"))
    (first, _), *counted = losses[STEPS - 1 - COUNTED : STEPS]
    rate = COUNTED * case.micro * case.length / (counted[-1][0] - first)
    return Play(rate, statistics.median(loss for _, loss in counted), peak / 2**30)


def done(words: list[str]) -> list[tuple[float, str]]:
    """The lines that a command prints, and when; this ends where it fails."""
    process = subprocess.Popen(
        words, cwd=ROOT, env={**one_gpu(), "PYTHONUNBUFFERED": "1", "TTY_COMPATIBLE": "0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    printed = [(time.perf_counter(), line) for line in process.stdout]
    if process.wait():
        sys.exit(f"✘ {' '.join(words)}\n{''.join(line for _, line in printed[-30:])}")
    return printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models and runs lie (40 GB)")
    parser.add_argument("--only", default="", help="the cases whose names hold this")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()

    import torch

    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("✘ no CUDA GPU is here; on a CPU: make bench, or --rehearse")
    on_cpu = () if torch.cuda.is_available() else ("--use_cpu", "true")
    contenders = {"Stepladder": (ours, ()), "`trl sft`, the same flags": (trl, on_cpu)}
    if importlib.util.find_spec("liger_kernel"):
        contenders["`trl sft`, with Liger's kernels"] = (trl, ("--use_liger_kernel", "true"))
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "a rehearsal, on a CPU", torch.__version__)
    print(f"\n{args.repeat} repetitions by turns, medians, in brackets the slowest and the fastest\n")
    print("| model, method, batch × tokens | | tokens/s | × `trl sft` | MFU | peak GiB | loss |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for case in REHEARSAL if args.rehearse else CASES:
        if args.only not in case.name:
            continue
        write_rows(case, args.folder)
        runs: dict[str, list[Play]] = {name: [] for name in contenders}
        for _ in range(args.repeat):
            for name, (play, more) in contenders.items():
                runs[name].append(play(case, args.folder, *more))
        what = f"{case.model.split('/')[-1]}, {case.method}, {case.micro} × {case.length}"
        found = {name: statistics.median(run.rate for run in plays) for name, plays in runs.items()}
        share = statistics.median(run.mfu for run in runs["Stepladder"]) / found["Stepladder"]
        for name, plays in runs.items():
            rates, rate = [run.rate for run in plays], found[name]
            print(f"| {what} | {name} | {rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
                  f"| {rate / found['`trl sft`, the same flags']:.2f} | {share * rate:.1%} "
                  f"| {max(run.gib for run in plays):.1f} | {plays[0].loss:.3f} |", flush=True)  # fmt: skip
            what = ""


if __name__ == "__main__":
    main()
