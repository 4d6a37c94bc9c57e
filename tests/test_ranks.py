"""A launch is what was asked for, or it stops."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from conftest import script
from stepladder import preflight
from stepladder.errors import LaunchError
from stepladder.recipe import load
from stepladder.training.launch import devices, launcher, ranks


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of a launcher, and none of another's."""

    def set_to(**values: str) -> None:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


SIZES = "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"


def hsdp(replicas: str, shards: str, ranks: int, local_ranks: int) -> dict[str, str]:
    """What `accelerate launch` sets for the rank 0 of so many, from a file with these two sizes."""
    return {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local_ranks), "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true", **dict(zip(SIZES, (replicas, shards), strict=True)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "strategy"),
    [
        ({}, "single"),
        (hsdp("auto", "auto", 16, 8), "hsdp"),
        (hsdp("auto", "auto", 8, 8), "fsdp"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload"),
        *(
            (
                {
                    "WORLD_SIZE": "2",
                    "ACCELERATE_USE_DEEPSPEED": "true",
                    "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"ds_configs/{name}.json",
                },
                name,
            )
            for name in ("zero2", "zero3", "zero3_offload")
        ),
    ],
)
def test_the_strategy_is_named_as_its_config(variables, strategy, environment) -> None:
    environment(**variables)
    assert launcher.read_launch().strategy == strategy


@pytest.mark.parametrize(
    ("asked", "ranks", "settled"),
    [
        (("auto", "auto"), (16, 8), ("2", "8")),
        (("auto", "auto"), (8, 8), None),
        (("auto", "2"), (8, 8), ("4", "2")),
        (("2", "auto"), (8, 8), ("2", "4")),
        (("auto", "16"), (32, 8), ("2", "16")),
        (("1", "8"), (8, 8), None),
        (("auto", "auto"), (12, 8), "1 replicas, each sharded over 8 ranks, are 8"),
        (("auto", "auto"), (2, 1), "a replica on one rank is the whole model, which is DDP"),
        (("8", "1"), (8, 8), "which is DDP"),
        (("2", "2"), (8, 8), "2 replicas, each sharded over 2 ranks, are 4"),
        (("16", "auto"), (8, 8), "are 0"),
        (("two", "auto"), (8, 8), "each is a number, or auto"),
        (("0", "8"), (8, 8), "each is a number, or auto"),
    ],
)
def test_the_sizes_of_hsdp(asked, ranks, settled, environment) -> None:
    """Guards `auto`, which Accelerate would end at with a traceback, and sizes that are not those of the ranks."""
    environment(**hsdp(*asked, *ranks))
    if isinstance(settled, str):
        with pytest.raises(LaunchError) as caught:
            launcher.read_launch()
        assert settled in str(caught.value)
        return
    (note,) = launcher.settle_mesh(launcher.read_launch())
    if settled:
        assert tuple(map(os.environ.get, SIZES)) == settled
        assert f"{settled[0]} replicas of the model, each sharded over {settled[1]} ranks" in note
    else:
        assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "false" and "accelerate_configs/fsdp.yaml" in note


def test_sizes_that_accelerate_does_not_read(environment, monkeypatch) -> None:
    """Guards a run under plain FSDP whose command line asked for replicas: Accelerate ignored it without a word."""
    words = ["python", "accelerate", "launch", "--config_file", "fsdp.yaml", "--parallelism_config_dp_shard_size", "2"]
    parent = SimpleNamespace(cmdline=lambda: [*words, "scripts/sft.py"])
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parents=lambda: [parent]))
    environment(ACCELERATE_USE_FSDP="true")
    with pytest.raises(LaunchError, match="--parallelism_config_dp_shard_size has no effect"):
        launcher.settle_mesh(launcher.read_launch())


def test_a_deepspeed_file_that_is_not_there(environment) -> None:
    environment(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE="elsewhere/zero2.json")
    with pytest.raises(LaunchError, match="elsewhere") as caught:
        launcher.read_launch()
    assert "ds_configs" in caught.value.help


NO_RANK, NO_PLACE = "is no rank of a launch", "WORLD_SIZE=2 without"
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": "two"}, NO_RANK),
        ({"WORLD_SIZE": "0"}, NO_RANK),
        ({"RANK": "1"}, NO_RANK),
        ({"LOCAL_RANK": "-1"}, NO_RANK),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, NO_RANK),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "2 copies of this were started"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 copies of this were started"),
        ({"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
    ],
)
def test_what_a_shell_has_kept_of_a_launch(left, said, tmp_path) -> None:
    """Guards a rank 1 of one that trained without a word and without run.json, tracebacks at numbers that are none, and
    `srun python`, of which each copy was a run of one rank. Where all is well it is the recipe that is not there."""
    done = script("sft", "--recipe", tmp_path / "none", **left)
    assert done.code == 2 and (said or "there is no recipe") in done.err and "Traceback" not in done.err, done


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_kept_strategy_without_a_launcher(name, environment) -> None:
    """Guards DeepSpeed's traceback, which looks for MPI where it is told of no ranks."""
    environment(**{name: "true"})
    with pytest.raises(LaunchError, match=f"{name}=true, and no launcher"):
        devices.choose_device(launcher.read_launch())


def test_where_the_ranks_of_a_kept_world_size_would_meet(environment, monkeypatch, capsys) -> None:
    """Guards Transformers' words about the recipe's keys, a rank 1 that ended without any, and one that waited for half
    an hour without saying for whom."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    environment(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    with pytest.raises(LaunchError, match=f"{NO_PLACE} MASTER_ADDR, MASTER_PORT") as caught:
        ranks.meeting(launcher.read_launch()).__enter__()
    assert caught.value.this_rank_only
    environment(**WHOLE)
    with ranks.meeting(launcher.read_launch()):
        pass
    assert "rank 1 waits for the others of WORLD_SIZE=2 at 127.0.0.1:29500" in capsys.readouterr().err


def test_fewer_ranks_than_launched(environment) -> None:
    """Guards against QLoRA collapsing to one rank without a word (axolotl#3839)."""
    environment(WORLD_SIZE="4")
    with pytest.raises(LaunchError, match="4 ranks were launched and 1 joined"):
        ranks.assert_launch(launcher.read_launch(), "cpu")


def test_more_ranks_than_gpus(environment, monkeypatch) -> None:
    """Guards against two ranks on one GPU (accelerate#1840); the GPUs are played by a stand-in."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    with pytest.raises(LaunchError, match="2 ranks on a machine with 1 GPU") as caught:
        devices.choose_device(launcher.read_launch())
    assert "--num_processes 1" in caught.value.help


@pytest.mark.parametrize(("visible", "seen"), [(None, "0"), ("3", "3"), ("2,3", None)])
def test_one_process_on_a_box_of_eight(visible, seen, environment, monkeypatch, capsys) -> None:
    """Guards the first command on a machine with several GPUs, which was a traceback. torch counts by NVML, which is
    played here; CUDA must not have been touched when the variable is set, since it reads it once."""
    import torch

    touched: list[str | None] = []

    def is_available() -> bool:
        touched.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return True

    def count() -> int:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 8 if shown is None else len(shown.split(","))

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", count)
    environment(**({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is None:
        with pytest.raises(LaunchError, match="one process sees 2 GPUs"):
            devices.choose_device(launcher.read_launch())
        return
    assert devices.choose_device(launcher.read_launch()) is False
    assert touched == [seen]
    assert ("8 GPUs are here" in capsys.readouterr().out) == (visible is None)


def test_use_cpu_where_gpus_are(environment, monkeypatch) -> None:
    """Guards `use_cpu: true` on a machine with a GPU: it was refused for two ranks, had one thread, and memory and
    precision were the GPU's; the GPU is played by a stand-in, which hides as CUDA's do."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shared_out: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", shared_out.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="0")
    assert devices.choose_device(launcher.read_launch(), use_cpu=True) and not torch.cuda.is_available()
    assert len(shared_out) == 1
    for threads, run_id, taken in (("3", "of-torchrun", 1), ("1", "of-torchrun", 2), ("1", "", 2)):
        # a user's number holds; a launcher's own 1 does not
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        if not run_id:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        devices.choose_device(launcher.read_launch(), use_cpu=True)
        assert len(shared_out) == taken
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    recipe = load.load("lora", ["--use_cpu", "true"])
    found = {check.name: check for check in preflight.checks(recipe, preflight.Machine())}
    assert found["strategy"].message.startswith("single on 1 rank,") and not torch.cuda.is_available()


def test_two_ranks_on_one_gpu(environment, monkeypatch) -> None:
    import torch
    import torch.distributed as dist

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda out, item: out.__setitem__(slice(None), [item, item]))
    environment(WORLD_SIZE="2")
    with pytest.raises(LaunchError, match="two ranks run on"):
        ranks.assert_launch(launcher.read_launch(), "cuda:0")
