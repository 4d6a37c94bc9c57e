"""fp8 products: refused where they cannot be had, and trained, saved and resumed by torchao's layers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import same_curve
from conftest import installed, losses, manifest, run
from same_curve import recipe_keys, write_rows
from stepladder import errors, hardware, requirements
from stepladder.model import fp8
from stepladder.planning import choose
from stepladder.training import arguments
from stepladder.training.launch.launcher import Launch, Strategy

TORCHAO = "torchao==0.18.0"
STEPS = 6
E4M3_MOST = 448.0  # the largest value of float8_e4m3fn (OCP 8-bit floating point specification)


def test_fp8_needs_its_package_and_its_strategy(settings: Callable[..., Any]) -> None:
    """Guards against a traceback after the model was loaded, and ZeRO, whose shards torchao's layers do not know."""
    recipe = settings(fp8=True)
    with pytest.raises(errors.LaunchError, match="takes torchao, which is not installed"):
        requirements.versions(recipe)
    for name in ("zero2", "zero3"):
        with pytest.raises(errors.RecipeError, match=f"cannot run under {name}"):
            arguments.check_strategy(recipe, Launch(2, 0, 0, 2, Strategy(name), 1))
    (note,) = arguments.check_strategy(recipe, Launch(2, 0, 0, 2, Strategy("fsdp"), 1))
    assert "not measured on a GPU" in note


@pytest.mark.parametrize(
    ("on_cpu", "hip", "capability", "said"),
    [(True, None, None, "on a CPU"), (False, None, (8, 0), "on Card"), (False, "7.0", (9, 4), "on Card")],
)
def test_fp8_needs_a_device_that_has_it(
    on_cpu: bool, hip: str | None, capability: tuple, said: str,
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards against a run that fails at its first product, or emulates it."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(errors.LaunchError, match=said):
        fp8.check_device(settings(fp8=True), on_cpu)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    fp8.check_device(settings(fp8=True), on_cpu=False)
    fp8.check_device(settings(), on_cpu=True)


# By NVIDIA's table of compute capabilities: 8.9 is Ada, 9.0 Hopper, 10 and 12 Blackwell.
WITH_FP8 = """h100 h100-pcie h100-nvl h100-64 h200 h200-nvl h20 gh200 gh200-144 b200 b300 gb200 gb300 l4 l40 l40s
6000-ada 4090 5090 pro-6000 pro-6000-max-q"""


def test_a_plan_knows_which_gpus_have_fp8(tiny: Path, settings: Callable[..., Any]) -> None:
    """Guards a job that waits in the queue for a GPU that cannot run it."""
    assert {row.name for row in hardware.GPUS if row.fp8} == {*WITH_FP8.split()}
    keys = {"model_name_or_path": str(tiny), "global_batch_size": 8, "max_length": 256}
    with pytest.raises(errors.LaunchError, match="fp8: true on a100"):
        choose.Plan(settings(fp8=True, **keys), 1, 1, hardware.device("a100"))
    for known in (hardware.device("h100", 70), dataclasses.replace(hardware.device("h100"), name="RTX 4080")):
        choose.Plan(settings(fp8=True, **keys), 1, 1, known)  # another memory, and a GPU that the table lacks
    peaks = [
        choose.Plan(settings(fp8=on, **keys), 1, 1, hardware.device("h100")).candidate(Strategy("single"), 8, False)
        for on in (False, True)
    ]
    tokens, inner, hidden = 8 * 256, 64, 32  # the layer with the most copies: the MLP's
    assert peaks[1].memory.total - peaks[0].memory.total == tokens * (inner + hidden) + inner * hidden


@pytest.fixture(scope="module")
def torchao(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder of its own: PEFT imports it wherever it is installed, which takes each process three seconds."""
    return installed(tmp_path_factory.mktemp("torchao"), TORCHAO)


def test_torchao_multiplies_what_the_page_says(torchao: Path, tiny: Path) -> None:
    """Guards which layers are replaced, their names, and the arithmetic: a scale per tensor, products of e4m3."""
    code = f"""
import functools, json, torch, torchao.float8
from types import SimpleNamespace
from transformers import AutoModelForCausalLM
from stepladder.model import fp8
torchao.float8.Float8LinearConfig = functools.partial(torchao.float8.Float8LinearConfig, emulate=True)
model = AutoModelForCausalLM.from_pretrained({str(tiny)!r}, dtype=torch.float32)
names = list(model.state_dict())
fp8.convert(model, SimpleNamespace())
assert list(model.state_dict()) == names
layer = model.model.layers[0].mlp.up_proj
torch.manual_seed(0)
given = torch.randn(16, 32)
def cast(tensor):
    scale = {E4M3_MOST} / tensor.abs().max().double()
    return (tensor * scale.float()).to(torch.float8_e4m3fn).float() / scale.float()
expected = cast(given) @ cast(layer.weight.detach()).T
found = layer(given).detach()
replaced = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
plain = given @ layer.weight.detach().T
print(json.dumps([replaced, float((found - expected).abs().max()), float((found - plain).abs().max())]))
"""
    done = run(sys.executable, "-c", code, PYTHONPATH=os.pathsep.join([str(torchao), str(same_curve.ROOT / "src")]))
    assert done.code == 0, done
    replaced, off, rounding = json.loads(done.out.splitlines()[-1])
    sides = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(replaced) == 3 * len(sides) and {name.rsplit(".", 1)[1] for name in replaced} == {*sides}
    assert off < 1e-5 < 1e-3 < rounding


@pytest.mark.proof
def test_a_run_in_fp8_trains_saves_and_resumes(
    torchao: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards fp8 from recipe to result: other losses than bf16's by its rounding, weights in the model's own dtype,
    a resumed run equal bit for bit, and FSDP within what the scales of other micro-batches change."""
    monkeypatch.setenv("PYTHONPATH", str(torchao))
    keys = recipe_keys("full", tiny, write_rows(tmp_path / "rows.jsonl"), steps=STEPS)
    keys |= {"bf16": True, "fp8": True, "save_strategy": "steps", "save_steps": 3, "use_cpu": True}

    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(keys))

    def job(name: str, *words: str, folder: str = "") -> dict[str, Any]:
        argv = ["--recipe", str(recipe), "--output_dir", str(tmp_path / (folder or name)), *words]
        return {"argv": argv, "port": same_curve.free_port(), "log": str(tmp_path / f"{name}.log")}

    def logs() -> str:
        return "\n".join(file.read_text() for file in sorted(tmp_path.glob("*.log")))

    alone = [job("whole"), job("bf16", "--fp8", "false"), job("halved", "--stop_at_step", "3")]
    alone.append(job("resumed", folder="halved"))
    script = "tests/fp8_emulated.py"
    same_curve.launch_many("plain", 1, alone, tmp_path / "alone.json", script)
    same_curve.launch_many("fsdp", 2, [job("fsdp")], tmp_path / "ranks.json", script)
    assert not list(tmp_path.glob("*.failed")), logs()

    whole, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == halved.keys() and all(torch.equal(whole[name], halved[name]) for name in whole)
    in_fp8, in_bf16, sharded = (losses(tmp_path / name) for name in ("whole", "bf16", "fsdp"))
    off = max(abs(a - b) for a, b in zip(in_fp8, in_bf16, strict=True))
    assert 1e-4 < off < 0.05 * in_bf16[0], (in_fp8, in_bf16)
    assert sharded == pytest.approx(in_fp8, rel=1e-2)  # e4m3 rounds each value by up to 2^-4
    assert manifest(tmp_path / "whole")["recipe"]["fp8"] is True


def test_a_model_without_a_layer_for_fp8_is_refused() -> None:
    """Guards a run that would be in bf16 throughout: GPT-2's projections are not torch.nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    assert not fp8._layers(model)
    assert fp8.scratch_bytes(model, 100) == 0
    with pytest.raises((errors.ModelError, ModuleNotFoundError)):
        fp8.convert(model, SimpleNamespace(where=lambda key: key))
