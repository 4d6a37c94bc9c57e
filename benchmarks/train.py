"""Non-padding tokens per second of training on this machine, beside `trl sft` and a bare PyTorch loop.

    python benchmarks/train.py --repeat 3
    python benchmarks/train.py --repeat 1 --method lora
    python benchmarks/train.py --ladder        # what each setting of the recipe is worth, one change a row
    python benchmarks/train.py --quick         # beside TRL's best flags alone, once: the ratio, in three minutes
    python benchmarks/train.py --quick --also="--padding_free true --max_length None"    # are they the best?

Each contender trains SmolLM2-135M on the same 72 conversations, 8 a step, in a process of its own, by turns, on all
cores: `trl sft` goes through accelerate, which gives it one thread where OMP_NUM_THREADS says nothing. A line is
printed at each step, and its time is taken as it comes: the figure is that of the second epoch, in which all train
the same tokens, so that imports, loading and the first steps do not count. `first step` is the time from the command to
the end of the first step. MFU is by the formula and the measured peak of watch/telemetry.py, the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stepladder.training.launch import devices

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models/smollm2-135m-instruct"
OURS, BEST = "Stepladder, the recipe", "`trl sft`, its best flags"
ROWS, BATCH = 72, 8
EPOCH = ROWS // BATCH
METHODS = {
    "lora": ("--use_peft", "true", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear"),
    "full": (),
    "qlora": ("--use_peft", "true", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear",
              "--load_in_4bit", "true"),
}  # fmt: skip
RECIPE = {"lora": "lora", "full": "sft", "qlora": "qlora"}
# Each row is the one above it with one change: what is left out by without.py, and flags.
PLAIN = ("--bf16", "false", "--per_device_train_batch_size", "1")
FOUR = ("--per_device_train_batch_size", "4")
ALL = "malloc,held,fused,sorted,loss,flat"
LADDER = {
    "fp32, gradient checkpointing, micro-batch 1": (ALL, *PLAIN, "--gradient_checkpointing=true"),
    "no checkpointing": (ALL, *PLAIN),
    "bf16 (`bf16: auto`, where the CPU has units for it)": ("malloc,held,fused,sorted,loss,flat", *PLAIN[2:]),
    "frozen weights in bf16": ("malloc,fused,sorted,loss,flat", *PLAIN[2:]),
    "fused LoRA layers": ("malloc,sorted,loss,flat", *PLAIN[2:]),
    "micro-batch 4": ("malloc,sorted,loss,flat", *FOUR),
    "rows of a step sorted by length": ("malloc,loss,flat", *FOUR),
    "logits of loss tokens only, each product once": ("malloc,flat", *FOUR),
    "rows without padding, attention per row in fp32": ("malloc,short", *FOUR),
    "attention of short rows by bf16 products": ("malloc", *FOUR),
    "micro-batch 8": ("malloc",),
    "tcmalloc in place of glibc's malloc (**the recipe as it is**)": ("",),
    "`dtype: bfloat16` (activations in bf16 too)": ("", "--dtype", "bfloat16"),
    "`torch_compile: true` in place of that": ("", "--torch_compile", "true"),
}
RATE = {"lora": "5e-4", "full": "5e-5", "qlora": "5e-4"}
MALLOC = devices.tcmalloc_environment()  # what raises the most elsewhere too, and the recipe takes by itself
THREADS = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}


Contenders = dict[str, tuple[list[str], dict[str, str]]]
# Seconds to the first step and of the second epoch, the losses, and the peak memory of the largest process in GiB.
Play = tuple[float, float, list[float], float]


def commands(method: str, folder: Path, also: str = "") -> Contenders:
    """By contender: what is typed, and the environment; `also` are more flags of TRL's best."""
    steps = str(2 * EPOCH)
    common = ["--model_name_or_path", str(MODEL), "--max_length", "512", "--max_steps", steps, "--report_to", "none"]
    common += ["--learning_rate", RATE[method], "--lr_scheduler_type", "constant"]
    common += ["--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--seed", "42"]
    trl = [str(Path(sys.executable).parent / "trl"), "sft", *common, *METHODS[method], "--dataset_name", str(folder)]
    trl += ["--per_device_train_batch_size", str(BATCH), "--use_cpu", "true", "--output_dir", str(folder / "trl")]
    best = ["--gradient_checkpointing", "false", "--bf16", "true", "--train_sampling_strategy", "group_by_length"]
    ours = [sys.executable, "scripts/sft.py", "--recipe", RECIPE[method], *common, "--output_dir", str(folder / "ours")]
    bare = [sys.executable, "benchmarks/bare_loop.py", method, str(folder / "train.jsonl"), steps, RATE[method]]
    contenders = {
        OURS: ([*ours, "--overwrite"], {}),
        "`trl sft`": (trl, THREADS),
        BEST: ([*trl, *best, "--dtype", "bfloat16", *also.split()], MALLOC | THREADS),
        "a bare PyTorch loop": (bare, MALLOC),
    }
    if method == "qlora":
        del contenders["a bare PyTorch loop"]
    return contenders


def ladder(folder: Path, first: int) -> Contenders:
    """By setting: what is typed."""
    (python, *words), env = commands("lora", folder)[OURS]
    return {
        name: ([python, "benchmarks/without.py", without, *words, *flags], env)
        for name, (without, *flags) in list(LADDER.items())[first - 1 :]
    }


def play(words: list[str], env: dict[str, str]) -> Play:
    began, times, losses = time.perf_counter(), [], []
    process = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **env, "PYTHONUNBUFFERED": "1", "TTY_COMPATIBLE": "0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    printed = []
    for line in process.stdout:
        printed.append(line)
        if found := re.search(r"(?:'loss': '?|\bloss (?:train: )?)([\d.]+)", line):
            times.append(time.perf_counter() - began)
            losses.append(float(found[1]))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(times) < 2 * EPOCH:
        sys.exit(f"✘ {' '.join(words)}\n{''.join(printed[-30:])}")
    return times[0], times[2 * EPOCH - 1] - times[EPOCH - 1], losses[: 2 * EPOCH], usage.ru_maxrss / 2**20


def mfu(folder: Path) -> float:
    """MFU of one token a second, by Stepladder's own run: with the same rows and model it is the others' too."""
    rows = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["mfu"] / row["tokens_per_second"] for row in rows)


def tokens(folder: Path) -> int:
    """Non-padding tokens of an epoch; the rows are written as TRL wants them."""
    from transformers import AutoTokenizer

    tokenizer, count, lines = AutoTokenizer.from_pretrained(MODEL), 0, []
    for line in (ROOT / "data/techco.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        count += len(tokenizer.apply_chat_template(turns, return_dict=False))
        lines.append(json.dumps({"prompt": turns[:1], "completion": turns[1:]}))
    assert len(lines) == ROWS
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return count


def measured(contenders: Contenders, count: int, folder: Path, repeat: int) -> tuple[dict[str, list[Play]], float]:
    """What each contender came to, by turns, and MFU of one token a second."""
    runs: dict[str, list[Play]] = {}
    for _ in range(repeat):
        for contender, (words, env) in contenders.items():
            runs.setdefault(contender, []).append(play(words, env))
            first, epoch, losses, memory = runs[contender][-1]
            print(f"{contender}: first step {first:.1f} s, {count / epoch:.0f} tokens/s, {memory:.1f} GiB, "
                  f"loss {statistics.mean(losses[EPOCH:]):.3f}", flush=True)  # fmt: skip
    return runs, mfu(folder)


def table(count: int, runs: dict[str, list[Play]], share: float, reference: str) -> None:
    """Medians of the repetitions, against one contender's; of tokens/s the slowest and the fastest too."""
    floor = statistics.median(epoch for _, epoch, _, _ in runs[reference])
    print(f"| | tokens/s | × {reference} | MFU | peak memory, GiB | first step, s | loss of the second epoch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for contender, found in runs.items():
        first, epoch, memory = (statistics.median(run[at] for run in found) for at in (0, 1, 3))
        loss = statistics.mean(statistics.mean(run[2][EPOCH:]) for run in found)
        rate, seconds = count / epoch, [run[1] for run in found]
        spread = f" ({count / max(seconds):.0f} to {count / min(seconds):.0f})" if len(found) > 1 else ""
        print(f"| {contender} | {rate:.0f}{spread} | {floor / epoch:.2f} | {share * rate:.0%} | {memory:.1f} "
              f"| {first:.1f} | {loss:.3f} |")  # fmt: skip
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--ladder", type=int, nargs="?", const=1, metavar="ROW", help="from which row on")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--also", default="", help="more flags for TRL's best")
    args = parser.parse_args()
    if args.quick:
        args.repeat, args.method = 1, ["lora"]
    for method in ["lora"] if args.ladder else args.method or METHODS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = tokens(folder)
            contenders = ladder(folder, args.ladder) if args.ladder else commands(method, folder, args.also)
            if args.quick:
                contenders = {name: contenders[name] for name in (OURS, BEST)}
            runs, share = measured(contenders, count, folder, args.repeat)
        print(f"\n{method}: {count} non-padding tokens an epoch, {args.repeat} repetitions, medians\n")
        table(count, runs, share, next(iter(contenders)) if args.ladder else BEST if args.quick else "`trl sft`")


if __name__ == "__main__":
    main()
