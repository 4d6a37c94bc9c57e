"""Every method under every strategy, world size, micro-batch and packing, against one plain process.

    python tests/same_curve.py                                # 312 runs, writes the tables of docs/compatibility.md
    python tests/same_curve.py --only qlora --only zero3      # a part of them, printed
    python tests/same_curve.py --gpu                          # this machine's GPU against its CPU, printed

Each launch is a real `accelerate launch` with a shipped config; the runs of one strategy share it
(tests/many_runs.py). `make same-curve` is the first of these commands; `make curve-gpu` the last, which was only
rehearsed: no GPU was lent yet, and without one it is a CPU against itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tiny import ROOT, SMOLLM2, make_tiny

PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- same-curve -->", "<!-- /same-curve -->"  # of the page's generated part
ADAPTER = {"use_peft": True, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
QUANTIZED = {"load_in_4bit": True, "use_bnb_nested_quant": True}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": ADAPTER,
    "qlora": ADAPTER | QUANTIZED,
    "dora": ADAPTER | {"use_dora": True},
}
# accelerate config and ranks
STRATEGIES = [
    *(("single", 1), ("ddp", 2), ("ddp", 3), ("ddp", 4), ("zero2", 2), ("zero3", 2), ("zero3_offload", 2)),
    *(("fsdp", 2), ("fsdp", 4), ("fsdp_offload", 2), ("hsdp", 4)),
]
GPU = "gpu"  # in place of a config: one plain process, on the device that it finds
MICRO = (1, 2, 4)
PACKED = {"unpacked": {"max_length": 400}, "packed": {"max_length": 640, "packing": True}}
ROWS, STEPS = 22, 30  # in batches of 8: three steps an epoch, the last of each with 6 rows
# bf16 keeps 8 bits: one rounding is 2^-9 = 2e-3 of a value, and 30 updates of Adam, which moves each
# weight by the learning rate whatever the size of its gradient, carry it on.
LOW_PRECISION = 1e-2
REAL, REAL_STEPS = ("ddp", "zero2", "zero3", "fsdp"), 12
LOGITS = 1e-4  # of the saved results, loaded in one process


def recipe_keys(method: str, model: Path, data: Path, packed: str = "unpacked", steps: int = STEPS) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "eval_dataset_name": str(data),
        **METHODS[method],
        **PACKED[packed],
        "learning_rate": 3e-3,
        "max_steps": steps,
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "gradient_checkpointing": False,
        "bf16": False,  # the same arithmetic on every machine
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
    }


def write_rows(file: Path) -> Path:
    """The first of TechCo's rows, of different lengths, in a number that the global batch does not divide."""
    file.write_text("\n".join((ROOT / "data/techco.jsonl").read_text().splitlines()[:ROWS]) + "\n")
    return file


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    method: str
    config: str
    ranks: int
    micro: int
    packed: str
    precision: str = "fp32"
    model: str = "tiny"

    @property
    def name(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))

    @property
    def reference(self) -> Cell:
        return dataclasses.replace(self, config="plain", ranks=1, micro=2)


def matrix() -> list[Cell]:
    """All of the tiny model in fp32, a part of it in bf16, and LoRA of SmolLM2-135M on two ranks."""
    axes = itertools.product(METHODS, STRATEGIES, MICRO, PACKED)
    cells = [Cell(method, config, ranks, micro, packed) for method, (config, ranks), micro, packed in axes]
    low = itertools.product(METHODS, STRATEGIES)
    cells += [Cell(method, config, ranks, 2, "unpacked", "bf16") for method, (config, ranks) in low]
    return cells + [Cell("lora", config, 2, 2, "unpacked", model="smollm2") for config in REAL]


def of_gpu() -> list[Cell]:
    """Every method in one process on the GPU; what they are held against runs on the CPU."""
    return [Cell(method, GPU, 1, 2, "unpacked", precision) for precision in ("fp32", "bf16") for method in METHODS]


def run_all(cells: list[Cell], folder: Path, steps: int = STEPS) -> None:
    """Run the cells, a launch for all of one strategy; each leaves its run folder and NAME.log."""
    make_tiny(folder / "tiny")
    data = write_rows(folder / "rows.jsonl")
    for (config, ranks), group in itertools.groupby(
        sorted(cells, key=lambda cell: (cell.config, cell.ranks)), key=lambda cell: (cell.config, cell.ranks)
    ):
        jobs = []
        for cell in group:
            model = {"tiny": folder / "tiny", "smollm2": SMOLLM2}[cell.model]
            keys = recipe_keys(cell.method, model, data, cell.packed, steps)
            keys |= {"per_device_train_batch_size": cell.micro, "bf16": cell.precision == "bf16"}
            keys["use_cpu"] = cell.config != GPU
            if cell.model == "smollm2":
                keys |= {"max_steps": REAL_STEPS, "learning_rate": 5e-4, "eval_strategy": "no"}
            Path(f"{folder / cell.name}.yaml").write_text(yaml.safe_dump(keys))
            argv = [
                "--recipe",
                str(folder / f"{cell.name}.yaml"),
                "--output_dir",
                str(folder / cell.name),
                "--overwrite",
            ]
            jobs.append({"argv": argv, "port": free_port(), "log": str(folder / f"{cell.name}.log")})
        began = time.perf_counter()
        launch_many(config, ranks, jobs, folder / f"{config}-{ranks}.json")
        print(f"{config} × {ranks}: {len(jobs)} runs in {time.perf_counter() - began:.0f} s", flush=True)


def launch_many(
    config: str, ranks: int, jobs: list[dict[str, Any]], file: Path, script: str = "tests/many_runs.py"
) -> None:
    file.write_text(json.dumps(jobs))
    for job in jobs:
        Path(f"{job['log']}.failed").unlink(missing_ok=True)  # of an earlier attempt
    command = [sys.executable] if config in ("plain", GPU) else launcher_words(config, ranks)
    # Sleeping threads: more ranks than cores would else wait for each other at full speed.
    env = {**one_gpu(), "OMP_WAIT_POLICY": "PASSIVE"}
    if config == GPU:  # imported once and forked, a process that has touched CUDA (bitsandbytes does) has none
        runs = []
        for job in jobs:
            with open(job["log"], "w") as out:
                words = [sys.executable, "scripts/sft.py", *job["argv"]]
                runs.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=out))
        for run in runs:
            run.wait()
        return
    env["CUDA_VISIBLE_DEVICES"] = ""
    with file.with_suffix(".out").open("w") as out:
        subprocess.run([*command, script, str(file)], cwd=ROOT, env=env, stdout=out, stderr=out)


def launcher_words(config: str | Path, ranks: int) -> list[str]:
    """`accelerate launch` with a shipped config or a file, on this machine alone; under hsdp with two replicas."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    file = config if isinstance(config, Path) else ROOT / f"accelerate_configs/{config}.yaml"
    words = [accelerate, "launch", "--config_file", str(file)]
    words += ["--parallelism_config_dp_shard_size", str(ranks // 2)] if config == "hsdp" else []
    return [*words, "--num_processes", str(ranks), "--main_process_port", "0"]


def one_gpu() -> dict[str, str]:
    """The environment of a process that sees the first GPU at most, this source tree first, and no hub."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0" if torch.cuda.device_count() else "")  # as NVML counts
    gpu = shown.split(",")[0]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def judged(cell: Cell, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """What a cell came to: `equal` with the differences measured, `refused` with its message, or `broken`."""
    from stepladder.reporting import curves

    log = (folder / f"{cell.name}.log").read_text() if (folder / f"{cell.name}.log").exists() else ""
    run = folder / cell.name
    if not finished(run):
        refused = [line for line in log.splitlines() if line.startswith("✘")]
        return {"outcome": "refused" if refused else "broken", "message": (refused or log.splitlines()[-1:] or [""])[0]}
    steps = REAL_STEPS if cell.model == "smollm2" else steps
    found = curves.difference(folder / cell.reference.name, run)
    if cell.precision == "fp32":
        equal = found.steps == steps and found.within()
        if cell.config == GPU:  # where a result is loaded in bf16
            logits = None
        else:
            logits = logits_apart(folder / cell.reference.name, run)
            equal = equal and logits <= LOGITS
    else:
        equal, logits = found.steps == steps and max(found.loss, found.eval_loss) <= LOW_PRECISION, None
    return {"outcome": "equal" if equal else "differs", "logits": logits, **vars(found)}


def finished(run: Path) -> bool:
    return (run / "run.json").is_file() and json.loads((run / "run.json").read_text())["status"] == "finished"


_answers: dict[Path, tuple[Any, str]] = {}


def answer_of(run: Path) -> tuple[Any, str]:
    """What the result saved in a run folder says, loaded in one process: logits of a text, and a greedy answer."""
    import torch

    from stepladder.evaluation.generation import generate_answers
    from stepladder.model.pretrained import load_for_inference

    if run not in _answers:
        model, tokenizer = load_for_inference(str(run))
        text = tokenizer("How can I track my order, and what if it is late?", return_tensors="pt")
        with torch.inference_mode():
            logits = model(**text).logits
        question = [{"role": "user", "content": "Where is my order?"}]
        _answers[run] = logits, generate_answers(model, tokenizer, [question], max_new_tokens=24)[0]
    return _answers[run]


def logits_apart(reference: Path, run: Path) -> float:
    """The largest difference of the saved results' logits; infinite where they answer differently."""
    (theirs, said), (ours, says) = answer_of(reference), answer_of(run)
    return float((theirs - ours).abs().max()) if said == says else float("inf")


def measured(results: dict[Cell, dict[str, Any]]) -> str:
    """The generated part of docs/compatibility.md: counts, versions and tables."""
    import importlib.metadata

    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    tiny = {cell: found for cell, found in results.items() if cell.model == "tiny"}
    fp32 = {cell: found for cell, found in tiny.items() if cell.precision == "fp32"}
    low = {cell: found for cell, found in tiny.items() if cell.precision == "bf16"}
    real = {cell: found for cell, found in results.items() if cell.model == "smollm2"}
    count = sum(found["outcome"] == "equal" for found in results.values())
    largest = {
        key: max((abs(found[key]) for found in fp32.values() if found["outcome"] == "equal"), default=float("nan"))
        for key in ("loss", "loss_residual", "grad_norm", "grad_norm_residual", "eval_loss", "logits")
    }
    lines = [
        f"{len(results)} runs, of which {count} are equal to one plain process (`python scripts/sft.py`) "
        f"with the same recipe. {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"no GPU; {versions}.",
        "",
        "## fp32",
        "",
        "Each cell covers six runs (micro-batch 1, 2 and 4, unpacked and packed) "
        "and shows the largest loss difference.",
        "",
        *table(fp32, len(MICRO) * len(PACKED)),
        "",
        "Largest differences over all cells: "
        + ", ".join(f"{key.replace('_', ' ')} {value:.1e}" for key, value in largest.items())
        + ".",
        "",
        "## bf16",
        "",
        f"Micro-batch 2, unpacked, tolerance {LOW_PRECISION:g}. bf16 has 8 significant bits, so summing in another "
        "order changes a value by up to 2e-3 of itself, and Adam's update has the size of the learning rate however "
        "small the gradient is. Each cell shows the largest loss difference.",
        "",
        *table(low, 1),
        "",
    ]
    if real:
        lines += [
            "## SmolLM2-135M",
            "",
            f"LoRA in fp32, {REAL_STEPS} steps, two ranks, compared with one plain process:",
            "",
            *(f"- {cell.config}: {found['outcome']} ({figures(found)})" for cell, found in real.items()),
            "",
            "![Five loss curves that coincide](img/same_curve.png)",
            "",
            "The picture is from `python scripts/report.py` with the five run folders.",
            "",
        ]
    odd = [(cell, found) for cell, found in results.items() if found["outcome"] != "equal"]
    if odd:
        lines += ["## Not equal", ""]
        lines += [f"- {cell.name}: {found['outcome']} {found.get('message') or figures(found)}" for cell, found in odd]
        lines.append("")
    return "\n".join(lines).rstrip()


def table(results: dict[Cell, dict[str, Any]], runs: int) -> list[str]:
    """A row a strategy, a column a method; each cell is of `runs` runs, or says how many of them there were."""
    rows = []
    for config, ranks in STRATEGIES:
        row = [f"{config} × {ranks}"]
        for method in METHODS:
            at = (method, config, ranks)
            found = [result for cell, result in results.items() if (cell.method, cell.config, cell.ranks) == at]
            words = sorted({result["outcome"] for result in found}) or ["not run"]
            if words == ["equal"]:
                words = [f"equal ({max(result['loss'] for result in found):.0e})"]
            if 0 < len(found) < runs:
                words.append(f"{len(found)} of {runs} runs")
            row.append(", ".join(words))
        rows.append(row)
    head = ["strategy", *METHODS]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def figures(found: dict[str, Any]) -> str:
    keys = ("loss", "loss_residual", "grad_norm", "grad_norm_residual", "eval_loss", "logits")
    return ", ".join(f"{key} {found[key]:.1e}" for key in keys if found.get(key) is not None)


def read_arguments(description: str | None, only: str, gpu: bool = False) -> argparse.Namespace:
    """The command line of a program that writes a part of the page; `folder` is there afterwards.

    Args:
        only: what `--only` names.
        gpu: whether the program has `--gpu`.
    """
    import tempfile

    from stepladder import console

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help=only)
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="one process on the GPU against one on the CPU")
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are there are not run again")
    parser.add_argument("--page", action="store_true", help="write the page from the finished runs in --folder")
    args = parser.parse_args()
    console.quiet_libraries()
    args.folder = (args.folder or Path(tempfile.mkdtemp(prefix=f"{Path(sys.argv[0]).stem}-"))).resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def write_generated(begin: str, text: str, end: str, folder: Path) -> None:
    """Replace what stands between two marks of docs/compatibility.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"{begin}\n")
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}; the runs lie in {folder}")


def main() -> int:
    args = read_arguments(__doc__, "a method, config, packing, precision or model", gpu=True)
    folder = args.folder
    cells = of_gpu() if args.gpu else matrix()
    wanted = [cell for cell in cells if {*args.only} <= {*map(str, dataclasses.astuple(cell))}]
    needed = dict.fromkeys([*(cell.reference for cell in wanted), *wanted])
    run_all([cell for cell in needed if not finished(folder / cell.name)], folder)
    if args.page:  # what there is, however little
        wanted = [cell for cell in matrix() if finished(folder / cell.name)]
    results = {cell: judged(cell, folder) for cell in wanted}
    for cell, found in results.items():
        print(f"{found['outcome']:8} {cell.name:45} {found.get('message') or figures(found)}")
    if args.page or not (args.only or args.gpu):
        write_generated(BEGIN, measured(results), END, folder)
    return int(any(found["outcome"] in ("differs", "broken") for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
