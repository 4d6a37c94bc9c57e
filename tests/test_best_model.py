"""`load_best_model_at_end` ends with the weights of the best step, bit for bit, under each strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import Session, difference

from conftest import manifest, metrics
from stepladder.training.checkpoint.resume import of_step, whole_steps

pytestmark = [pytest.mark.proof, pytest.mark.alone]

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"},
}
STEPS, ADAPTER = 6, "adapter_model.safetensors"
BREAKS = """
import shutil
from pathlib import Path
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")
"""


class Best(Session):
    def __init__(self, folder: Path, model: Path, rows: Path, evaluated: Path):
        super().__init__(folder, model, rows)
        self.evaluated = evaluated

    def keys(self, **more: Any) -> list[str]:
        keys = {
            "eval_dataset_name": self.evaluated, "global_batch_size": 4, "max_steps": STEPS, "eval_strategy": "steps",
            "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 0.3,
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": STEPS,  # ends in ruin
        }  # fmt: skip
        return super().keys(**keys | more)


def best_step(folder: Path) -> int:
    """The step of the lowest evaluation loss, which must lie in the middle for a test to mean anything."""
    found = min((row for row in metrics(folder) if "eval_loss" in row), key=lambda row: row["eval_loss"])["step"]
    assert 1 < found < STEPS, [row.get("eval_loss") for row in metrics(folder)]
    return int(found)


def tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): value
        for file in files
        if file.is_file()
        for name, value in load_file(file).items()
    }


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, put together from the ranges that each rank has written."""
    cut: dict[str, dict[int, torch.Tensor]] = {}
    shapes: dict[str, list[int]] = {}
    whole: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("model-*.safetensors"):
        with safe_open(file, "pt") as stored:
            of_file = json.loads(stored.metadata()["shapes"])
            for key in stored.keys():  # noqa: SIM118
                name, _, start = key.replace(".default", "").rpartition("@")
                if key in of_file:
                    cut.setdefault(name, {})[int(start)] = stored.get_tensor(key)
                    shapes[name] = of_file[key]
                else:
                    whole[key.replace(".default", "")] = stored.get_tensor(key)
    return whole | {n: torch.cat([p[at] for at in sorted(p)]).reshape(shapes[n]) for n, p in cut.items()}


def assert_result_is(folder: Path, step: int) -> None:
    result = tensors([folder / "model.safetensors", folder / ADAPTER])
    best = saved_weights(of_step(folder, step))
    assert result.keys() - best.keys() <= {"lm_head.weight"}  # tied, and saved twice under FSDP
    assert all(torch.equal(result[name], best[name]) for name in best)
    facts = manifest(folder)
    assert facts["result_step"] == step
    assert facts["final"]["eval_loss"] == min(row["eval_loss"] for row in metrics(folder) if "eval_loss" in row)


@pytest.mark.parametrize(("config", "ranks"), [("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp", 2)])
def test_the_result_is_the_best_step(config, ranks, tiny, contrary_rows, tmp_path) -> None:
    """Guards the choice, which Transformers makes in a method that is replaced here: the last step was the result.
    Guards too a best step between two saves, and one before the step that a run is resumed from; and a checkpoint
    written after an evaluation, in which FSDP's lacked the optimizer's state of the root's parameters."""
    session = Best(tmp_path, tiny, *contrary_rows)
    runs = {}
    for method, keys in METHODS.items():
        folder = session.train(method, **keys, save_total_limit=None, save_steps=4)
        runs[folder] = session.resume(folder, f"{method}-again", 4, **keys)
    session.start(config, ranks)
    for folder, again in runs.items():
        step = best_step(folder)
        assert_result_is(folder, step)
        assert_result_is(again, step)
        assert max(difference(folder, again).values()) <= 1e-6
        assert {4, STEPS, step} <= {*whole_steps(folder)}
        assert whole_steps(again) == [step, STEPS], "save_total_limit: 1 keeps the best and the newest"


def test_in_one_process(tiny, contrary_rows, tmp_path) -> None:
    """Guards the weights by a run that never chose: its last step is the other's best one. And guards against the last
    step as the result when the best checkpoint is gone, found at the end and by the start after it."""
    (tmp_path / "breaks.py").write_text(BREAKS)
    session, lora = Best(tmp_path, tiny, *contrary_rows), METHODS["lora"]
    chosen = session.train("chosen", **lora)
    for step in (2, 3):
        session.train(f"ended-{step}", **lora, max_steps=step, load_best_model_at_end=False)
    broken = session.train("broken", "--callback", tmp_path / "breaks.py", **lora)
    session.resume(broken, "again", STEPS, **lora)
    session.commands.append({"cut": [str(broken), str(tmp_path / "last"), STEPS]})
    words = ["--load_best_model_at_end", "false", "--allow_change", "load_best_model_at_end"]
    last = session.train("last", *words, **lora)
    done = session.start(codes=[0, 0, 0, 2, 2, 0])
    best = best_step(chosen)
    assert whole_steps(chosen) == [best, STEPS]
    assert_result_is(chosen, best)
    result, ended = load_file(chosen / ADAPTER), load_file(tmp_path / f"ended-{best}" / ADAPTER)
    assert all(torch.equal(value, ended[name]) for name, value in result.items())
    assert f"checkpoint-{best}, cannot be loaded" in done.out
    assert f"checkpoint-{best}, is not whole" in done.out and f"checkpoint-{best} is missing" in done.out
    assert manifest(last)["result_step"] == STEPS
