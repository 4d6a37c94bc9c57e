"""Tokens per second, MFU and peak memory on a CUDA GPU with random weights, beside TRL; not run yet: no GPU was lent.

    python benchmarks/train_gpu.py --folder /tmp/train-gpu

Both train ten steps of the same full rows; the figure is that of the last five. Nothing is downloaded. MFU counts
6 operations a parameter and token in full fine-tuning and 4 with LoRA, attention apart, of the data sheet's dense bf16
rate (training/utilization.py); recomputation is in the HFU only.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from plan_gpu import EIGHT, METHODS, ROOT, SMALL, Case, make_model

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


def flags(case: Case, folder: Path) -> list[str]:
    """What both are told."""
    words = ["--model_name_or_path", str(make_model(case.model, folder)), *METHODS[case.method], "--bf16", "true"]
    words += ["--max_length", str(case.length), "--per_device_train_batch_size", str(case.micro)]
    words += ["--gradient_checkpointing", str(case.checkpointing).lower(), "--max_steps", str(STEPS)]
    words += ["--learning_rate", "1e-5", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    return [*words, "--report_to", "none", "--attn_implementation", "sdpa"]


def ours(case: Case, folder: Path) -> dict[str, float]:
    run = folder / "ours"
    words = ["--recipe", "sft", *flags(case, folder), "--dataset_name", str(folder / "rows.jsonl"), "--overwrite"]
    words += ["--global_batch_size", str(case.micro), "--eval_dataset_name", "null", "--output_dir", str(run)]
    words += ["--dtype", case.dtype] if case.method != "qlora" else ["--dtype", "null"]
    subprocess.run([sys.executable, "scripts/sft.py", *words], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-COUNTED:]
    facts = json.loads((run / "run.json").read_text())
    for weights in run.glob("*.safetensors"):
        weights.unlink()
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "mfu": statistics.median(row["mfu"] for row in rows),
        "gib": max(facts["totals"]["peak_memory_bytes"]) / 2**30,
    }


def trl(case: Case, folder: Path) -> float:
    """Tokens per second by the clock on the lines that TRL prints; nan where it fails."""
    program = str(Path(sys.executable).parent / "trl")
    words = [program, "sft", *flags(case, folder), "--dataset_name", str(folder / "trl")]
    words += ["--output_dir", str(folder / "theirs"), "--dtype", case.dtype, "--gradient_accumulation_steps", "1"]
    process = subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    times = [time.perf_counter() for line in process.stdout if re.search(r"'loss': ", line)]
    if process.wait() or len(times) < STEPS:
        return float("nan")
    return COUNTED * case.micro * case.length / (times[STEPS - 1] - times[STEPS - 1 - COUNTED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models and runs lie (40 GB)")
    parser.add_argument("--only", default="", help="the cases whose names hold this")
    args = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("✘ no CUDA GPU is here; on a CPU: make bench")
    (args.folder / "trl").mkdir(parents=True, exist_ok=True)
    words = " ".join(f"word {number}" for number in range(8000))  # longer than any length here
    pairs = [(f"Tell me {number}.", words) for number in range(80)]
    lines = [json.dumps({"input": question, "output": answer}) for question, answer in pairs]
    (args.folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    turns = [([{"role": "user", "content": q}], [{"role": "assistant", "content": a}]) for q, a in pairs]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in turns]
    (args.folder / "trl/train.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | method | batch × tokens | tokens/s | MFU | peak GiB | × `trl sft` |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for case in CASES:
        if args.only in case.name:
            here, there = ours(case, args.folder), trl(case, args.folder)
            ratio = here["tokens_per_second"] / there
            name, speed = case.model.split("/")[-1], f"{here['tokens_per_second']:,.0f} | {here['mfu']:.1%}"
            batch = f"{case.micro} × {case.length}"
            print(f"| {name} | {case.method} | {batch} | {speed} | {here['gib']:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
