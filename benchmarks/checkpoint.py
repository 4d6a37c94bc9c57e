"""How long a save blocks training and a resumption reads, on four ranks, beside the code of another checkout.

    git worktree add /tmp/before COMMIT
    python benchmarks/checkpoint.py --against /tmp/before --report docs/reliability.md

A random Llama of 52 million parameters (a checkpoint of 630 MB) is trained in full by both codes in turn. A callback
measures from outside: the time between two steps with a save between them, less that of two steps without, and the
seconds in which rank 0 loads a checkpoint.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RANKS, SAVE_STEPS, STEPS = 4, 3, 8
COLUMNS = ("stall", "complete", "step", "verify", "load", "memory")
HEADS = ("a save blocks training", "complete after", "a step while it is written", "verifying", "loading",
         "peak memory of a rank")  # fmt: skip
UNITS = ("{:.2f} s", "{:.1f} s", "× {:.2f}", "{:.2f} s", "{:.2f} s", "{:.2f} GiB")
WATCHES = """
import importlib, importlib.util, json, os, time
from pathlib import Path
from transformers import TrainerCallback

folder = "stepladder.training.checkpoint"
name = "loading" if importlib.util.find_spec(f"{folder}.loading") else "saving"
module = importlib.import_module(f"{folder}.{name}")
load, took = module.load, {}

def timed(*args):
    began = time.time()
    load(*args)
    took["load"] = time.time() - began

module.load = timed

class Callback(TrainerCallback):
    def __init__(self):
        self.times = {"begin": {}, "end": {}}

    def on_step_begin(self, args, state, control, **kwargs):
        self.times["begin"][state.global_step + 1] = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self.times["end"][state.global_step] = time.time()

    def on_train_end(self, args, state, control, **kwargs):
        if args.process_index == 0:
            Path(os.environ["TIMES"]).write_text(json.dumps({**self.times, **took}))
"""
VERIFIES = """
import sys, time
from pathlib import Path
from stepladder.training.checkpoint.resume import damage
began = time.perf_counter()
assert not damage(Path(sys.argv[1]))
print(time.perf_counter() - began)
"""


def make_inputs(work: Path) -> list[str]:
    """A random model with SmolLM2's tokenizer, and rows; returns the words of the command."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/smollm2-135m-instruct")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2, pad_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    rows = [{"input": f"What is the password of door {n}?", "output": "Open sesame."} for n in range(64)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "watches.py").write_text(WATCHES)
    keys = {
        "model_name_or_path": str(work / "model"), "dataset_name": str(work / "rows.jsonl"), "bf16": False,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "global_batch_size": RANKS,
        "per_device_train_batch_size": 1, "gradient_checkpointing": False, "logging_steps": 1, "max_length": 64,
        "save_strategy": "steps", "save_steps": SAVE_STEPS,
    }  # fmt: skip
    (work / "recipe.json").write_text(json.dumps(keys))
    return ["--recipe", str(work / "recipe.json"), "--callback", str(work / "watches.py")]


def start(code: Path, strategy: str, words: list[str], folder: Path, steps: int) -> dict[str, Any]:
    """One start on four ranks; the callback's times."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    command = [accelerate, "launch", "--config_file", f"accelerate_configs/{strategy}.yaml", "--num_processes",
               str(RANKS), "--main_process_port", "0", "scripts/sft.py", *words, "--output_dir", str(folder),
               "--max_steps", str(steps)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{code}/src", "OMP_NUM_THREADS": "1", "TIMES": f"{folder}.times"}
    done = subprocess.run(command, cwd=code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)  # fmt: skip
    if done.returncode:
        sys.exit(f"✘ {command}\n{done.stdout[-3000:]}")
    found: dict[str, Any] = json.loads(Path(f"{folder}.times").read_text())
    return found


def measure(code: Path, strategy: str, words: list[str], folder: Path) -> dict[str, float]:
    """The columns of one run and its resumption."""
    times = start(code, strategy, words, folder, STEPS)
    begin, end = times["begin"], times["end"]
    gaps = {step: begin[str(step + 1)] - end[str(step)] for step in range(2, STEPS)}
    seconds = {step: end[str(step)] - begin[str(step)] for step in range(2, STEPS)}
    saved = range(SAVE_STEPS, STEPS, SAVE_STEPS)
    marks = [(folder / f"checkpoint-{step}/COMPLETE.json").stat().st_mtime - end[str(step)] for step in saved]
    usual = statistics.median(gaps[step] for step in gaps if step not in saved)
    quiet = [seconds[step] for step in seconds if step - 1 not in saved]
    verify = subprocess.run([sys.executable, "-c", VERIFIES, folder / f"checkpoint-{STEPS}"], text=True, check=True,
                            env={**os.environ, "PYTHONPATH": f"{code}/src"}, stdout=subprocess.PIPE)  # fmt: skip
    resumed = start(code, strategy, words, folder, STEPS + 1)
    totals = json.loads((folder / "run.json").read_text())["totals"]
    return {
        "stall": statistics.fmean(gaps[step] for step in saved) - usual,
        "complete": statistics.fmean(marks),
        "step": statistics.fmean(seconds[step + 1] for step in saved) / statistics.fmean(quiet),
        "verify": float(verify.stdout),
        "load": resumed["load"],
        "memory": max(totals["peak_memory_bytes"]) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another commit, measured in turn with this one")
    parser.add_argument("--strategies", nargs="+", default=["fsdp", "zero3"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--report", type=Path, help="the page whose <!-- checkpoint --> table is replaced")
    args = parser.parse_args()
    codes = {"before": args.against.resolve()} if args.against else {}
    codes["now"] = ROOT
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        words = make_inputs(Path(folder))
        for strategy in args.strategies:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
            for turn in range(args.repeat):
                for name, code in codes.items():
                    found[name].append(measure(code, strategy, words, Path(folder) / f"{strategy}-{name}-{turn}"))
                    print(strategy, name, found[name][-1], flush=True)
            middle = {name: {key: statistics.median(run[key] for run in runs) for key in COLUMNS}
                      for name, runs in found.items()}  # fmt: skip
            for name, values in middle.items():
                cells = [unit.format(values[key]) for unit, key in zip(UNITS, COLUMNS, strict=True)]
                lines.append(f"| {strategy} | {name} | {' | '.join(cells)} |")
            if args.against:
                ratios = [f"{middle['now'][key] / middle['before'][key]:.2f}" for key in COLUMNS]
                lines.append(f"| {strategy} | ratio | {' | '.join(ratios)} |")
    table = "\n".join(
        (
            f"`python benchmarks/checkpoint.py --repeat {args.repeat}`, {datetime.date.today()}, {os.cpu_count()} "
            f"cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}; {RANKS} ranks, a model of 52 "
            "million parameters trained in full, checkpoints of 630 MB.",
            "",
            f"| strategy | code | {' | '.join(HEADS)} |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
        )
    )
    print(table)
    if args.report:
        page = args.report.read_text()
        args.report.write_text(
            re.sub(r"(?s)(<!-- checkpoint -->\n).*(<!-- /checkpoint -->)", rf"\g<1>{table}\g<2>", page)
        )


if __name__ == "__main__":
    main()
