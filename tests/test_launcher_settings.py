"""What a launcher's configuration may set too is left to the recipe, or refused: run.json says what runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, Done, manifest, metrics, run
from stepladder.errors import LaunchError
from stepladder.training.launch import launcher

pytestmark = [pytest.mark.proof, pytest.mark.alone]


def start(config: Path | str, recipe: Path, folder: Path, *words: str, ranks: int = 2) -> Done:
    accelerate = Path(sys.executable).with_name("accelerate")
    return run(
        accelerate, "launch", "--config_file", config, "--num_processes", ranks, "--main_process_port", "0", *words,
        "scripts/sft.py", "--recipe", recipe, "--output_dir", folder,
    )  # fmt: skip


@pytest.fixture
def recipe(tiny, learnable, write_recipe) -> Path:
    return write_recipe(
        model_name_or_path=str(tiny), dataset_name=str(learnable), max_steps=2, global_batch_size=8, max_length=192,
        per_device_train_batch_size=2, bf16=False, gradient_checkpointing=False, logging_steps=1, max_grad_norm=0.01,
        save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip


def test_the_recipe_decides(recipe, tmp_path) -> None:
    """Guards fp32 that `--mixed_precision bf16` made bf16 while run.json said fp32, and the accumulation and clipping
    that `accelerate config` writes for DeepSpeed without a file; and results that a launcher's configuration would have
    had saved in shards: files of one model are written whatever it says."""
    deepspeed = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_machines": 1, "machine_rank": 0,
        "mixed_precision": "bf16", "deepspeed_config": {
            "zero_stage": 3, "gradient_accumulation_steps": 4, "gradient_clipping": 5.0, "zero3_init_flag": True,
            "offload_optimizer_device": "none", "offload_param_device": "none", "zero3_save_16bit_model": False,
        },
    }  # fmt: skip
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(deepspeed))
    launches = {
        "plain": ("accelerate_configs/ddp.yaml",),
        "ddp": ("accelerate_configs/ddp.yaml", "--mixed_precision", "bf16"),
        "fsdp": (
            "accelerate_configs/fsdp.yaml",
            "--mixed_precision",
            "bf16",
            "--fsdp_state_dict_type",
            "SHARDED_STATE_DICT",
        ),
        "zero3": (tmp_path / "zero3.yaml",),
    }
    losses = {}
    for name, (config, *words) in launches.items():
        done = start(config, recipe, tmp_path / name, *words)
        assert done.code == 0, done
        assert ("mixed_precision: bf16 of the launcher is not used" in done.out) == (name != "plain"), done
        assert ("gradient_clipping: 5.0 of the launcher is not used" in done.out) == (name == "zero3"), done
        facts = manifest(tmp_path / name)
        assert (facts["precision"], facts["gradient_accumulation_steps"], facts["max_grad_norm"]) == ("fp32", 2, 0.01)
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    for name, found in losses.items():
        assert found == pytest.approx(losses["plain"], abs=1e-5), name


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"gradient_clipping": 5.0, "bf16": {"enabled": True}}, ["gradient_clipping=5.0", "bf16.enabled=True"]),
        ({"gradient_clipping": None}, ["max_grad_norm: 1.0 instead of 0.01"]),
    ],
)
def test_a_deepspeed_file_that_contradicts_is_refused(fixed, said, recipe, tmp_path) -> None:
    """Guards a traceback (Transformers' own check), and a file without clipping, for which Accelerate puts 1.0."""
    content = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | fixed
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    config = yaml.safe_load((ROOT / "accelerate_configs/zero2.yaml").read_text())
    config["deepspeed_config"]["deepspeed_config_file"] = str(file)
    (tmp_path / "zero2.yaml").write_text(yaml.safe_dump(config))
    done = start(tmp_path / "zero2.yaml", recipe, tmp_path / "run", ranks=1)
    assert all(words in done.out + done.err for words in said), done
    assert "✘" in done.out + done.err and "ValueError" not in done.out + done.err, done
    assert manifest(tmp_path / "run")["status"] == "failed"


CUT = ("cp_size", "tp_size", "sp_size")
FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
ZERO3 = {"stage": 3}


@pytest.mark.parametrize(
    ("kind", "block", "said"),
    [
        ("FSDP", {"fsdp_config": {**FSDP, "fsdp_version": 1}}, "fsdp_version: 1"),
        ("FSDP", {"fsdp_config": {**FSDP, "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}}, "SIZE_BASED_WRAP"),
        ("FSDP", {"fsdp_config": {**FSDP, "fsdp_ignored_modules": ".*norm"}}, "fsdp_ignored_modules: .*norm"),
        *(("FSDP", {"fsdp_config": FSDP, "parallelism_config": {f"parallelism_config_{key}": 2}}, key) for key in CUT),
        ("FSDP", {"fsdp_config": FSDP, "parallelism_config": {"parallelism_config_dp_shard_size": 2}}, ""),
        ("FSDP", {"fsdp_config": FSDP, "parallelism_config": {"parallelism_config_dp_shard_size": 4}}, "dp_shard_size"),
        ("MULTI_GPU", {"parallelism_config": {"parallelism_config_dp_replicate_size": 2}}, "without FSDP"),
        ("MEGATRON_LM", {"megatron_lm_config": {"megatron_lm_tp_degree": 1}}, "Megatron-LM"),
        ("DEEPSPEED", {"deepspeed_config": {"zero_stage": 1}}, "ZeRO stage 1"),
        ("DEEPSPEED", {"deepspeed_config": {"zero_stage": 2}}, ""),
        ("DEEPSPEED", {"zero_optimization": ZERO3}, ""),
        ("DEEPSPEED", {"zero_optimization": {**ZERO3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ("DEEPSPEED", {"zero_optimization": ZERO3, "optimizer": {"type": "AdamW"}}, "the recipe's optim"),
        ("DEEPSPEED", {"zero_optimization": ZERO3, "scheduler": {"type": "WarmupLR"}}, "lr_scheduler_type"),
    ],
)  # fmt: skip
def test_what_no_strategy_here_does_is_refused(kind, block, said, tmp_path, monkeypatch) -> None:
    """Guards configurations of other projects: tracebacks, another optimizer and schedule than the recipe's, and sizes
    of a mesh that are not those of the ranks. Accelerate itself makes its environment of them."""
    from accelerate.commands import launch

    if "zero_optimization" in block:
        (tmp_path / "ds.json").write_text(json.dumps(block))
        block = {"deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}}
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind, "num_machines": 1, "num_processes": 2,
              "machine_rank": 0, "mixed_precision": "no", **block}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config_file", str(tmp_path / "config.yaml"), "--main_process_port", "0", "sft.py"]
    args = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]
    args.deepspeed_fields_from_accelerate_config = ""  # as launch_command() sets it
    made = launch.prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else launch.prepare_multi_gpu_env(args)
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not said:
        assert launcher.read_launch().strategy in ("fsdp", "zero2", "zero3")
        return
    with pytest.raises(LaunchError) as caught:
        launcher.read_launch()
    assert said in str(caught.value), caught.value
