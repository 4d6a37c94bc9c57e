"""PEFT's methods under every strategy: the same curve as one process, a resumed run bit for bit, a merge, the plan.

    python tests/peft_methods.py                          # writes the table of docs/compatibility.md (25 minutes)
    python tests/peft_methods.py --only ia3 --only ddp    # a part of it, printed

The runs of one strategy share an `accelerate launch` (tests/many_runs.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import same_curve
from same_curve import ADAPTER
from tiny import make_tiny

BEGIN, END = "<!-- peft-methods -->", "<!-- /peft-methods -->"  # of the page's generated part
NAMED = ADAPTER | {"lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
RANKS = {"rank_pattern": {r"layers\.0\..*q_proj": 4, "down_proj": 16}, "alpha_pattern": {"down_proj": 8}}
OFT = {"use_cayley_neumann": False, "block_share": True, "target_modules": ["q_proj", "v_proj", "up_proj"],
       "exclude_modules": ["layers.1.mlp.up_proj"]}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "gaussian": ADAPTER | {"peft_kwargs": {"init_lora_weights": "gaussian"}},
    "orthogonal": ADAPTER | {"peft_kwargs": {"init_lora_weights": "orthogonal"}},
    "rslora": ADAPTER | {"use_rslora": True},
    "patterns": NAMED | {"peft_kwargs": RANKS},
    "layers": NAMED | {"peft_kwargs": {"layers_to_transform": [0, 2], "exclude_modules": r".*\.2\..*v_proj"}},
    "loraplus": ADAPTER | {"loraplus_lr_ratio": 4, "weight_decay": 0.01},
    "ia3": {"use_peft": True, "peft_type": "ia3"},
    "vera": {"use_peft": True, "peft_type": "vera", "peft_kwargs": {"r": 16, "target_modules": "all-linear"}},
    "vera_bf16": {"use_peft": True, "peft_type": "vera", "peft_kwargs": {"r": 16}, "bf16": True},
    "vera_4bit": {"use_peft": True, "peft_type": "vera", "peft_kwargs": {"r": 16}, "load_in_4bit": True},
    "oft": {"use_peft": True, "peft_type": "oft", "peft_kwargs": {"oft_block_size": 8, "target_modules": "all-linear"}},
    "oft_exact": {"use_peft": True, "peft_type": "oft", "peft_kwargs": {"oft_block_size": 8, **OFT}},
    "oft_4bit": {"use_peft": True, "peft_type": "oft", "peft_kwargs": {"oft_block_size": 8}, "load_in_4bit": True},
    "pissa": ADAPTER | {"peft_kwargs": {"init_lora_weights": "pissa"}},
    "pissa_niter": ADAPTER | {"peft_kwargs": {"init_lora_weights": "pissa_niter_4"}},
    "olora": ADAPTER | {"peft_kwargs": {"init_lora_weights": "olora"}},
}
SHOWN = {  # in the page's table, which is of fp32
    "gaussian": "`init_lora_weights: gaussian`",
    "orthogonal": "`init_lora_weights: orthogonal`",
    "rslora": "`use_rslora: true`",
    "patterns": "`rank_pattern`, `alpha_pattern`",
    "layers": "`layers_to_transform`, `exclude_modules`",
    "loraplus": "`loraplus_lr_ratio: 4`",
    "ia3": "`peft_type: ia3`",
    "vera": "`peft_type: vera`",
    "vera_4bit": "`peft_type: vera`, 4 bits",
    "oft": "`peft_type: oft`",
    "oft_exact": "`oft`: exact Cayley, `block_share`",
    "oft_4bit": "`peft_type: oft`, 4 bits",
    "pissa": "`init_lora_weights: pissa`",
    "pissa_niter": "`init_lora_weights: pissa_niter_4`",
    "olora": "`init_lora_weights: olora`",
}
STRATEGIES = {"single": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp": 2, "hsdp": 4}
STEPS, STOP = 6, 3


@dataclass(frozen=True)
class Cell:
    """A method under a strategy."""

    method: str
    strategy: str

    def folder(self, root: Path, kind: str = "run") -> Path:
        """Of the uninterrupted `run`, or of the one that was `resumed`."""
        return root / f"{self.strategy}-{self.method}-{kind}"


def run_all(cells: Iterable[Cell], root: Path) -> None:
    """Train each cell, train it again with a stop and resume it, and merge the results of one process."""
    model, data = make_tiny(root / "tiny"), same_curve.write_rows(root / "rows.jsonl")
    for strategy in dict.fromkeys(cell.strategy for cell in cells):
        jobs = []
        for cell in (cell for cell in cells if cell.strategy == strategy):
            recipe = root / f"{cell.method}.yaml"
            recipe.write_text(yaml.safe_dump(recipe_keys(cell.method, model, data)))
            run, resumed = cell.folder(root), cell.folder(root, "resumed")
            words = ["--recipe", str(recipe), "--output_dir"]
            jobs.append(_job([*words, str(run), "--overwrite"], root / f"{run.name}.log"))
            stop = [*words, str(resumed), "--overwrite", "--stop_at_step", str(STOP)]
            jobs.append(_job(stop, root / f"{resumed.name}.stopped.log"))
            jobs.append(_job([*words, str(resumed)], root / f"{resumed.name}.log"))
            if strategy == "single":
                merged = root / f"{cell.method}-merged"
                argv = ["--adapter", str(run), "--output_dir", str(merged), "--overwrite", "--dtype", "fp32"]
                argv += ["--quantized_base", "dequantized"] if METHODS[cell.method].get("load_in_4bit") else []
                jobs.append(_job(argv, root / f"{merged.name}.log") | {"script": "scripts/merge.py"})
        began = time.perf_counter()
        same_curve.launch_many(strategy, STRATEGIES[strategy], jobs, root / f"{strategy}.json")
        print(f"{strategy}: {len(jobs)} runs in {time.perf_counter() - began:.0f} s", flush=True)


def recipe_keys(method: str, model: Path, data: Path) -> dict[str, Any]:
    keys = same_curve.recipe_keys("full", model, data, steps=STEPS)
    keys |= {"learning_rate": 3e-3, "warmup_steps": 1, "use_cpu": True, "save_strategy": "steps", "save_steps": STOP}
    return keys | METHODS[method]


def _job(argv: list[str], log: Path) -> dict[str, Any]:
    return {"argv": argv, "port": same_curve.free_port(), "log": str(log)}


def judge(cell: Cell, root: Path) -> dict[str, Any]:
    """Whether the cell's curve and result are those of one process, and its resumed run is its own bit for bit."""
    from stepladder.reporting import curves

    run, resumed, single = cell.folder(root), cell.folder(root, "resumed"), Cell(cell.method, "single").folder(root)
    if not same_curve.finished(run):
        log = (root / f"{run.name}.log").read_text()
        refused = [line for line in log.splitlines() if line.startswith("✘")]
        return {"outcome": "refused" if refused else "broken", "message": (refused or log.splitlines()[-1:])[0]}
    found = curves.difference(single, run)
    logits = same_curve.logits_apart(single, run)
    bounds = 1000 if METHODS[cell.method].get("bf16") else 1  # as same_curve.py has it
    equal = found.steps == STEPS and found.within(bounds) and logits <= bounds * same_curve.LOGITS
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run, resumed)]
    resumes = same_curve.finished(resumed) and losses(run) == losses(resumed) and adapters[0] == adapters[1]
    return {"outcome": "equal" if equal else "differs", "loss": found.loss, "logits": logits, "resumes": resumes}


def losses(run: Path) -> list[tuple[Any, ...]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def merge_error(method: str, root: Path) -> tuple[float, bool]:
    """How far the merged model's logits are from base and adapter in fp32, and whether the merge was streamed."""
    facts = json.loads((root / f"{method}-merged/merge.json").read_text())
    return facts["proof"]["exact"]["max"], facts["streamed"]


def plan_error(method: str, root: Path) -> int:
    """How many trained parameters the plan counts, less those of the run."""
    from stepladder.planning import meta_model, trace
    from stepladder.recipe import load

    recipe = load.load(str(root / f"{method}.yaml"), [])
    work = meta_model.Work(1, 8, "fp32", checkpointing=False)
    planned = trace.trace_batch(recipe, meta_model.load_config(recipe), work).whole.trainable
    run = json.loads((Cell(method, "single").folder(root) / "run.json").read_text())
    return round(planned) - int(run["parameters"]["trainable"])


def table(results: dict[Cell, dict[str, Any]], root: Path) -> str:
    """The generated part of docs/compatibility.md."""
    rows = [["method", *STRATEGIES, "resumes", "merge", "plan"], ["---"] * (len(STRATEGIES) + 4)]
    for method, name in SHOWN.items():
        found = {cell.strategy: result for cell, result in results.items() if cell.method == method}
        if "single" not in found:
            continue
        cells = [found[strategy]["outcome"] if strategy in found else "not run" for strategy in STRATEGIES]
        error, streamed = merge_error(method, root)
        resumes = "bit for bit" if all(result.get("resumes") for result in found.values()) else "differs"
        merge = f"{error:.0e}{'' if streamed else ', in memory'}"
        rows.append([name, *cells, resumes, merge, "exact" if not plan_error(method, root) else "differs"])
    largest = max(result["loss"] for result in results.values() if result["outcome"] == "equal")
    words = f"{len(results)} cells, {time.strftime('%Y-%m-%d')}. Largest difference of a loss from one process: "
    return "\n".join([f"{words}{largest:.0e}.", "", *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> int:
    args = same_curve.read_arguments(__doc__, "a method or a strategy")
    root = args.folder
    wanted = [Cell(method, strategy) for strategy in STRATEGIES for method in METHODS]
    wanted = [cell for cell in wanted if {*args.only} <= {cell.method, cell.strategy}]
    needed = dict.fromkeys([*(Cell(cell.method, "single") for cell in wanted), *wanted])
    if args.page:  # what there is, however little
        wanted = [cell for cell in wanted if same_curve.finished(cell.folder(root, "resumed"))]
    else:
        run_all([cell for cell in needed if not same_curve.finished(cell.folder(root, "resumed"))], root)
    results = {cell: judge(cell, root) for cell in wanted}
    for cell, found in results.items():
        print(f"{found['outcome']:8} {cell.strategy:7} {cell.method:10} {found}")
    if not args.only:
        same_curve.write_generated(BEGIN, table(results, root), END, root)
    return int(any(found["outcome"] != "equal" or not found["resumes"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
