"""Host memory from the load of a model to the first step, of four ranks together; writes docs/planning.md's table.

    python benchmarks/loading.py --folder /tmp/loading

Measured are private bytes (RssAnon, tests/measure_load.py) of real launches of scripts/sft.py on CPU, of a random
Llama of 252 million parameters, in multiples of its size in fp32. The shards lie in host memory here; where they lie
on GPUs, only what is read and what is under way does: the host memory that a plan for GPUs has, in brackets.
Freed tensors are returned at once (MALLOC_MMAP_THRESHOLD_): else what glibc keeps of them is measured too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import measure_load  # noqa: E402

import same_curve  # noqa: E402
from tiny import make_tiny, whole  # noqa: E402

RANKS, MARK = 4, "<!-- loading -->\n"


@dataclass(frozen=True)
class Case:
    """One load: the dtype and number of the files, and the recipe's `dtype`."""

    strategy: str
    method: str
    saved: str = "float32"
    files: str = "one"
    dtype: str = "float32"
    bf16: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))

    def __str__(self) -> str:
        """The files, and what they are read as."""
        short = {"float32": "fp32", "bfloat16": "bf16"}
        return f"{short[self.saved]} file{'s' * (self.files != 'one')} as {short[self.dtype]}"

    def recipe(self, folder: Path) -> dict[str, Any]:
        model = folder / f"{self.saved}-{self.files}"
        return same_curve.recipe_keys(self.method, model, folder / "rows.jsonl") | {
            "dtype": self.dtype,
            "bf16": self.bf16,
            "max_steps": 1,
            "max_length": 256,
            "eval_strategy": "no",
            "eval_dataset_name": None,
            "per_device_train_batch_size": 1,
            "global_batch_size": RANKS,
        }


KINDS = [
    {},
    {"files": "several"},
    {"saved": "bfloat16"},
    {"saved": "bfloat16", "files": "several"},
    {"saved": "bfloat16", "dtype": "bfloat16", "bf16": True},
]
STRATEGIES, METHODS = ("fsdp", "hsdp", "zero3"), ("full", "lora")
CASES = [Case(*each, **kind) for each in itertools.product(STRATEGIES, METHODS) for kind in KINDS]


def prepare(folder: Path) -> None:
    """The models, each in a folder by its dtype and number of files, and rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny = make_tiny(folder / "tiny")
    same_curve.write_rows(folder / "rows.jsonl")
    config = LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=17, num_attention_heads=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    for saved, files in itertools.product(("float32", "bfloat16"), ("one", "several")):

        def make(part: Path, dtype: str = saved, size: str = {"one": "5GB", "several": "100MB"}[files]) -> None:
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(part, max_shard_size=size)
            AutoTokenizer.from_pretrained(tiny).save_pretrained(part)

        whole(folder / f"{saved}-{files}", make)


def measure(cases: list[Case], folder: Path) -> None:
    """Run the cases, a launch for all of one strategy."""
    import yaml

    for strategy, group in itertools.groupby(cases, key=lambda case: case.strategy):
        jobs = []
        for case in group:
            recipe = folder / f"{case.name}.yaml"
            recipe.write_text(yaml.safe_dump(case.recipe(folder)))
            argv = ["--recipe", str(recipe), "--output_dir", str(folder / case.name), "--overwrite"]
            log = str(folder / f"{case.name}.log")
            jobs.append({"argv": argv, "port": same_curve.free_port(), "log": log, "stop": True})
        same_curve.launch_many(strategy, RANKS, jobs, folder / f"{strategy}.json", script="tests/measure_load.py")


def plan(case: Case, folder: Path) -> float:
    """Bytes of host memory that a plan for GPUs counts for the load."""
    from stepladder import hardware
    from stepladder.planning import choose
    from stepladder.recipe import load
    from stepladder.training.launch.launcher import Strategy

    recipe = load.load(str(folder / f"{case.name}.yaml"), [])
    planned = choose.Plan(recipe, 1, RANKS, hardware.device("h100"))
    return planned.candidate(Strategy(case.strategy), 1, False).memory.host


def table(cases: list[Case], folder: Path) -> str:
    """Markdown rows, one per strategy and method."""
    size = sum(file.stat().st_size for file in (folder / "float32-one").glob("*.safetensors"))
    heads = [str(Case("", "", **kind)) for kind in KINDS]
    rows = [f"| strategy | method | {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * len(heads)]
    for each, group in itertools.groupby(cases, key=lambda case: (case.strategy, case.method)):
        cells = list(each)
        for case in group:
            together, _ = measure_load.peaks(folder / f"{case.name}.log", RANKS)
            cells.append(f"{together / size:.2f} ({plan(case, folder) / size:.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models and the runs lie")
    parser.add_argument("--only", default="", help="the cases whose names hold this")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced, between its two loading marks")
    parser.add_argument("--measured", action="store_true", help="take the runs that lie there")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder)
    cases = [case for case in CASES if args.only in case.name]
    if not args.measured:
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
        measure(cases, args.folder)
    rows = table(cases, args.folder)
    print(rows)
    if args.page:
        before, _, after = args.page.read_text().split(MARK)
        args.page.write_text(f"{before}{MARK}{rows}\n{MARK}{after}")


if __name__ == "__main__":
    main()
