"""Each method by the real scripts on a CUDA device that lies in host memory: all for a GPU but its kernels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import host_cuda
import pytest
import safetensors

import same_curve
from conftest import losses, manifest, metrics

METHODS: dict[str, tuple[str, ...]] = {
    "full": ("sft",),
    "lora": ("lora",),
    "dora": ("lora", "--use_dora", "true"),
    "packed": ("sft", "--packing", "true"),
    "fp16": ("lora", "--bf16", "false", "--fp16", "true"),
    "checkpointing": ("sft", "--gradient_checkpointing", "true"),
}
CPU = {f"{name}-cpu": METHODS[name] for name in ("full", "lora", "packed")}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Run folder and output of each, forked from one process: four steps with evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, Any]] = []

    def add(name: str, script: str, *words: str) -> None:
        log = str(folder / f"{name}.log")
        jobs.append({"script": f"scripts/{script}.py", "argv": list(words), "port": 0, "log": log})

    def sft(name: str, recipe: str, *words: str, steps: int = 4) -> None:
        common = ("--model_name_or_path", str(tiny), "--max_steps", str(steps), "--eval_strategy", "steps",
                  "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2",
                  "--per_device_train_batch_size", "4", "--output_dir", str(folder / name.split("+")[0]))  # fmt: skip
        add(name, "sft", "--recipe", recipe, *common, *words)

    for name, words in METHODS.items():
        sft(name, *words)
    for name, words in CPU.items():
        sft(name, *words, "--use_cpu", "true", "--bf16", "true")
    sft("lora+", "lora", steps=6)
    add("merge", "merge", "--adapter", str(folder / "lora"), "--output_dir", str(folder / "merge"), "--device", "cuda")
    add("generate", "generate", "--model", str(folder / "lora"), "--prompt", "Where is it?", "--max_new_tokens", "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOST_CUDA", str(host_cuda.build(folder)))
        same_curve.launch_many("plain", 1, jobs, folder / "jobs.json", "tests/host_cuda.py")
    names = [Path(job["log"]).stem for job in jobs]
    return {name: (folder / name, (folder / f"{name}.log").read_text()) for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_on_it(method: str, runs: dict) -> None:
    """Guards the step of each method on a GPU: one tensor left on the CPU, on its way through the model, the loss, the
    optimizer, the evaluation or a checkpoint, is refused here as CUDA refuses it."""
    run, said = runs[method]
    assert "✔ 4 steps" in said and ":cuda:0" in said, said[-4000:]
    facts = manifest(run)
    assert facts["status"] == "finished" and facts["precision"] == ("fp16" if method == "fp16" else "bf16")
    assert facts["totals"]["reserved_memory_bytes"] == 3 << 30 and "H100" in facts["totals"]["peak_flops_source"]
    rows = [row for row in metrics(run) if "loss" in row][:4]  # one of them was trained on
    assert len(rows) == 4 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    with safetensors.safe_open(run / "checkpoint-4/rng-0.safetensors", "pt") as states:
        assert "cuda" in states.keys()  # noqa: SIM118


@pytest.mark.parametrize("method", [name.removesuffix("-cpu") for name in CPU])
def test_its_curve_is_the_cpu_s(method: str, runs: dict) -> None:
    """Guards against a branch for GPUs that computes something else: other rows, another mask, another loss."""
    cpu, gpu = losses(runs[f"{method}-cpu"][0]), losses(runs[method][0])[:4]
    assert len(cpu) == 4 and gpu == pytest.approx(cpu, abs=same_curve.LOW_PRECISION)


def test_it_is_resumed_merged_and_asked(runs: dict) -> None:
    """Guards the random state of a GPU, which comes back, and the scripts that load a result on the best device."""
    assert "✔ 6 steps" in runs["lora+"][1] and len(losses(runs["lora"][0])) == 6, runs["lora+"][1][-4000:]
    merged, said = runs["merge"]
    assert (merged / "model.safetensors").is_file(), said[-4000:]
    assert "Traceback" not in runs["generate"][1] and "CUDA touched" in runs["generate"][1], runs["generate"][1][-4000:]
