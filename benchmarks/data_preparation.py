"""Rows per second from a file to tokens and labels, beside TRL's own preparation of the same rows.

    python benchmarks/data_preparation.py --rows 100000

Both are timed in one run, alternating, without caches; the trained tokens are compared, so that
speed is not bought with another result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from stepladder import console

console.quiet_libraries()

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from stepladder.data import mixture, prepare, render  # noqa: E402
from stepladder.model.embedded import DEFAULT_FOLDER  # noqa: E402
from stepladder.recipe.recipe import Recipe  # noqa: E402


def write_rows(file: Path, count: int) -> None:
    """TechCo's rows over and over, each with its number, as TRL's prompt-completion messages."""
    source = [json.loads(line) for line in Path("data/techco.jsonl").read_text().splitlines()]
    with file.open("w") as out:
        for number in range(count):
            row = source[number % len(source)]
            prompt = [{"role": "user", "content": f"({number}) {row['input']}"}]
            completion = [{"role": "assistant", "content": row["output"]}]
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def ours(file: Path, tokenizer) -> tuple[float, float, int]:
    """The first preparation, and one that finds it in the cache."""
    recipe = Recipe(name="benchmark", path=Path("benchmark"), values={"max_length": None}, origins={})
    took = []
    for _ in range(2):
        began = time.perf_counter()
        folder = prepare.prepare_rows(mixture.from_name(str(file)), None, tokenizer, recipe)
        dataset, _ = prepare.open_prepared(folder)
        took.append(time.perf_counter() - began)
    shutil.rmtree(folder)
    return took[0], took[1], trained(dataset)


def theirs(file: Path, tokenizer, model, folder: str) -> tuple[float, int]:
    """SFTTrainer's own preparation: it happens as the trainer is made."""
    config = trl.SFTConfig(output_dir=folder, use_cpu=True, bf16=False, max_length=None, report_to="none")
    began = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    return seconds, trained(trainer.train_dataset)


def trained(dataset) -> int:
    import pyarrow.compute as pc

    labels = pc.list_flatten(dataset.data.column("labels"))
    return int(pc.sum(pc.not_equal(labels, render.IGNORED)).as_py())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    console.quiet_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER)
    times: dict[str, list[float]] = {"Stepladder": [], "again": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        file = Path(folder) / "rows.jsonl"
        write_rows(file, args.rows)
        for number in range(args.repeat):
            first, again, tokens = ours(file, tokenizer)
            times["Stepladder"].append(first)
            times["again"].append(again)
            seconds, their_tokens = theirs(file, tokenizer, model, f"{folder}/{number}")
            times["TRL"].append(seconds)
            # TRL trains the line break after the end of turn too: one token more a row.
            print(f"trained tokens: {tokens:,} here, {their_tokens:,} by TRL ({their_tokens - tokens:,} more)")
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{args.rows:,} rows; {versions}; {machine}; {time.strftime('%Y-%m-%d')}")
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in middle.items():
        print(f"{name:11} {seconds:7.1f} s  {args.rows / seconds:9,.0f} rows/s")
    print(f"ratio       {middle['TRL'] / middle['Stepladder']:7.1f}")


if __name__ == "__main__":
    main()
