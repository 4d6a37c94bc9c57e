"""Memory and seconds from a data file to the first training step, by scripts/sft.py and check.py themselves.

    python benchmarks/data_memory.py --rows 1000 1000000 --ranks 1 4

Rows are short conversations of random words, by a seed. A tiny model is trained for one step, so that what counts is
the data. Memory is what no file backs (RssAnon), summed over all processes of a command, the peak of 20 samples a
second; of few rows it is what the libraries take.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import transformers
import yaml

from stepladder.model.embedded import DEFAULT_FOLDER

GIB = 1 << 30
SIDES = ("input", "output")  # columns
FEWEST, MOST = 8, 60  # words of an output; an input has half as many at most
ROLES = (("user", "input"), ("assistant", "output"))
KEYS = {"max_length": 512, "max_steps": 1, "global_batch_size": 8, "per_device_train_batch_size": 2, "bf16": False,
        "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "use_cpu": True}  # fmt: skip


def rows(count: int, most: int = MOST) -> Iterator[dict[str, str]]:
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(20_000)]
    for _ in range(count):
        longest = zip(SIDES, (most // 2, most), strict=True)
        yield {name: " ".join(draw.choices(words, k=draw.randint(min(FEWEST, k), k))) for name, k in longest}


def write(file: Path, count: int, most: int) -> None:
    with file.open("w", newline="") as out:
        if file.suffix == ".csv":
            writer = csv.DictWriter(out, SIDES)
            writer.writeheader()
            writer.writerows(rows(count, most))
        elif file.suffix == ".parquet":
            import datasets

            given = {"count": count, "most": most}
            made = datasets.Dataset.from_generator(rows, gen_kwargs=given, cache_dir=str(file.parent / "hf"))
            made.to_parquet(str(file))
        else:
            begin, between, end = ("[\n", ",\n", "\n]\n") if file.suffix == ".json" else ("", "\n", "\n")
            out.write(begin)
            for number, row in enumerate(rows(count, most)):
                turns = [{"role": role, "content": row[name]} for role, name in ROLES]
                out.write(between * (number > 0) + json.dumps({"messages": turns}))
            out.write(end)


def make_model(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(DEFAULT_FOLDER)
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": None,
                   "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16})  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(DEFAULT_FOLDER).save_pretrained(folder)


def anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) << 10


def measure(*words: object, **env: str) -> tuple[float, int, int]:
    """Seconds of a command, and the peaks of its memory: of all processes together and of one, in bytes."""
    began, together, alone = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as said:
        command = list(map(str, words))
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | env)
        while process.poll() is None:
            try:
                tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
            except psutil.NoSuchProcess:
                break
            held = list(map(anonymous_bytes, tree))
            together, alone = max(together, sum(held)), max(alone, *held)
            time.sleep(0.05)
        if process.wait():
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-3000:]}")
    return time.perf_counter() - began, together, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--words", type=int, default=MOST, help="the most words of an answer")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--kind", default="jsonl", choices=("jsonl", "json", "csv", "parquet"))
    parser.add_argument("--keys", nargs="*", default=[], help="further keys of the recipe: packing=true")
    parser.add_argument("--audit", action="store_true", help="check.py --audit too")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    print("| rows | command | seconds | GiB, all processes | GiB, the largest |\n| ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        make_model(folder / "model")
        for count in args.rows:
            file = folder / f"rows.{args.kind}"
            write(file, count, args.words)
            recipe = folder / "recipe.yaml"
            further = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in args.keys)}
            named = {"model_name_or_path": str(folder / "model"), "dataset_name": str(file)}
            recipe.write_text(yaml.safe_dump(KEYS | named | further))
            own = {"XDG_CACHE_HOME": str(folder / "cache")}
            for ranks in args.ranks:
                shutil.rmtree(folder / "cache", ignore_errors=True)
                sft = [sys.executable]
                if ranks > 1:
                    ddp = ("--config_file", "accelerate_configs/ddp.yaml", "--num_processes", ranks)
                    sft += ["-m", "accelerate.commands.launch", *ddp]
                sft += ["scripts/sft.py", "--recipe", recipe, "--output_dir", folder / "run", "--overwrite"]
                for what in (f"sft.py, {ranks} rank{'s' * (ranks > 1)}", "the same, cached"):
                    report(count, what, *measure(*sft, **own))
            if args.audit:
                lengths = ("--min_input", 1, "--min_output", 1)  # short rows are no fault here
                audit = [sys.executable, "scripts/check.py", "--recipe", recipe, "--audit", *lengths]
                report(count, "check.py --audit", *measure(*audit, **own))


def report(count: int, what: str, seconds: float, together: int, alone: int) -> None:
    print(f"| {count:,} | {what} | {seconds:.0f} | {together / GIB:.2f} | {alone / GIB:.2f} |", flush=True)


if __name__ == "__main__":
    main()
