"""What a job decides, how a sweep unfolds, what a sick node is: without Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from conftest import ROOT, script
from stepladder import errors, hardware
from stepladder.cluster import health, job, queue, sweep


def test_a_job_knows_the_flags_of_sft() -> None:
    """Guards a new flag of sft.py, which the check before the ranks would take for an unknown key."""
    flags = re.findall(r'add_argument\("(--\w+)"(.*)', (ROOT / "scripts/sft.py").read_text())
    assert len(flags) > 4
    for flag, rest in flags:
        words = [flag] if "store_true" in rest else [flag, "lora" if flag == "--recipe" else "x"]
        assert job.recipe_of(["--recipe", "lora", *words]).name == "lora", flag


@pytest.mark.parametrize(
    ("manifest", "restarts", "cancelled", "decided"),
    [
        ({"status": "finished"}, 0, False, "finished"),
        ({"status": "failed"}, 0, False, "failed"),
        ({"status": "stuck"}, 3, False, "failed"),
        ({"status": "running"}, 0, False, "failed"),  # killed: it could not say more
        ({"status": "preempted", "step": 8, "from": 4, "starts": 1}, 0, False, "again"),
        ({"status": "preempted", "step": 8, "from": 4, "starts": 1}, 0, True, "preempted"),
        ({"status": "preempted", "step": 8, "from": 4, "starts": 1}, 100, False, "preempted"),
        ({"status": "preempted", "step": 4, "from": 4, "starts": 2}, 2, False, "again"),
        ({"status": "preempted", "step": 4, "from": 4, "starts": 3}, 3, False, "preempted"),
        ({"status": "preempted", "step": 5, "from": 4, "starts": 3}, 3, False, "again"),
    ],
)
def test_what_becomes_of_a_job(manifest: dict, restarts: int, cancelled: bool, decided: str, tmp_path: Path) -> None:
    """Guards the requeue: a failure, a cancellation, no progress, or too many starts must not come back for ever."""
    facts = {"status": manifest["status"], "totals": {"steps": manifest.get("step", 0)},
             "progress": {"step": manifest.get("from", 0), "starts": manifest.get("starts", 1)}}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert job.decide_requeue(tmp_path, restarts, cancelled)[0] == decided
    (tmp_path / job.STOP).touch()
    assert job.decide_requeue(tmp_path, restarts, cancelled)[0] == decided.replace("again", "preempted")


def test_a_job_without_a_run_has_failed(tmp_path: Path) -> None:
    assert job.decide_requeue(tmp_path, 0)[0] == "failed"


def test_a_refused_start_is_not_taken_for_the_run_that_stands(tmp_path, monkeypatch) -> None:
    """Guards what waits for a job (`afterok`) against the run of another job, which a refused start leaves as it is."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    for number, decided in (("7", "failed"), ("8", "finished")):
        (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "slurm": {"job_id": number}}))
        assert job.decide_requeue(tmp_path, 0)[0] == decided


def test_a_sweep_unfolds_into_folders_of_their_own(tmp_path: Path) -> None:
    """Guards the array: every combination once, each value as the recipe's own type, no two runs in one folder."""
    file = tmp_path / "sweep.yaml"
    file.write_text("recipe: lora\nmax_steps: 5\ngrid: {lora_r: [8, 16], lora_target_modules: [all-linear, [q_proj]]}")
    found = [job.recipe_of(words) for words in sweep.read_sweep(file).runs]
    assert [(r.get("lora_r"), r.get("lora_target_modules")) for r in found] == [
        (8, ["all-linear"]), (8, ["q_proj"]), (16, ["all-linear"]), (16, ["q_proj"])
    ]  # fmt: skip
    assert {r.get("max_steps") for r in found} == {5}
    assert len({r.output_dir for r in found}) == 4
    for shipped in (ROOT / "slurm/sweeps").glob("*.yaml"):
        assert [job.recipe_of(words) for words in sweep.read_sweep(shipped).runs]


@pytest.mark.parametrize(
    ("content", "said"),
    [("recipe: lora", "a list of values"), ("grid: {lora_r: [8]}", "names its recipe"), ("[", "not a sweep"),
     ("recipe: lora\nlora_r: 4\ngrid: {lora_r: [8]}", "lora_r is in the grid and beside it"),
     ("recipe: lora\ngrid: {lora_r: 8}", "a list of values")],
)  # fmt: skip
def test_a_file_that_is_no_sweep_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(errors.RecipeError, match=said):
        sweep.read_sweep(tmp_path / "sweep.yaml")


def test_hostile_names_stay_words(tmp_path: Path) -> None:
    """Guards `submit.py`: what a user types becomes one argument each, and no option of sbatch or of the shell."""
    folder = tmp_path / "a; touch pwned $(touch pwned) `touch pwned` 'x' \"y\" %j"
    done = script("submit", "--recipe", "lora", "--output_dir", folder, "--report_to", "wandb",
                  "--run_name", "x\n#SBATCH --uid=0", "--dry_run")  # fmt: skip
    assert done.code == 0, done
    command = done.out.partition("\n\n#!/usr/bin/env bash")[0].removeprefix("# ")
    # What a shell makes of the line that was printed: sbatch and its words.
    words = subprocess.run(["bash", "-c", f'sbatch() {{ printf "%s\\0" "$@"; }}; {command}'], cwd=tmp_path,
                           capture_output=True, text=True, check=True).stdout.split("\0")  # fmt: skip
    assert str(folder) in words and "x\n#SBATCH --uid=0" in words
    assert f"--output={str(folder).replace('%', '%%')}/slurm-%j.out" in words
    assert not list(tmp_path.rglob("pwned"))
    assert done.out.endswith((ROOT / "slurm/sft.sbatch").read_text().splitlines()[-1] + "\n\n")
    for value in ("main;id", "a b", "$(id)", "x\ny", ""):
        with pytest.raises(errors.LaunchError, match="no name"):
            queue.sbatch_options({"partition": value})
    with pytest.raises(errors.LaunchError, match="cannot hold"):
        queue.log_pattern(Path("a\nb"), "x")


def test_a_token_never_gets_into_a_job(tmp_path: Path) -> None:
    done = script("submit", "--recipe", "lora", "--hub_token", "hf_secret", "--dry_run")
    assert done.code == 2 and "HF_TOKEN" in done.err and "hf_secret" not in done.out + done.err


def test_submit_refuses_a_site_that_is_not_there() -> None:
    """Guards the queue: the job would wait, and end at the first line of its environment."""
    done = script("submit", "--recipe", "lora", "--dry_run", STEPLADDER_SITE="lumy")
    assert done.code == 2 and "STEPLADDER_SITE=lumy: no such file" in done.err and " lumi " in done.err, done
    done = script("submit", "--recipe", "lora", "--dry_run", STEPLADDER_SITE="lumi")
    assert done.code == 0 and done.out.startswith("# sbatch"), done


def test_submit_plans_where_it_knows_the_gpus() -> None:
    """Guards the queue against jobs that never fitted, and `auto` against a plan that the job is not given;
    what a recipe's own checkpointing costs is said."""
    full = ("--recipe", "models/qwen3-8b/full", "--gpus", "h100:8", "--dry_run")
    done = script("submit", *full, "--strategy", "ddp")
    assert done.code == 2 and "it does not fit: plan: ddp, micro-batch 1" in done.err and "Traceback" not in done.err, (
        done
    )
    assert not done.out
    done = script("submit", *full, "--strategy", "fsdp")
    assert "# plan: fsdp, micro-batch 1, checkpointing on" in done.out and "--strategy auto" in done.out, done
    done = script("submit", *full, "--strategy", "auto")
    assert "as fast" not in done.out, "nothing is left on the table"
    assert done.code == 0 and done.out.startswith("# plan: fsdp, micro-batch 1, checkpointing off"), done
    assert "--strategy fsdp --per_device_train_batch_size 1 --gradient_checkpointing false" in done.out.splitlines()[1]
    # 37 GiB by the plan, whether the type is known or not
    words = ("--recipe", "models/qwen3-8b/full", "--gpus", "4", "--strategy", "fsdp", "--dry_run")
    done = script("submit", *words, "--gpu_memory", "36")
    assert done.code == 2 and "of each 36 GiB" in done.err and "Traceback" not in done.err, done
    done = script("submit", "--recipe", "models/qwen3-8b/full", "--gpus", "h100:4", "--gpu-memory", "78", *words[4:])
    assert done.code == 0 and "of each 78 GiB" in done.out, done
    done = script("submit", "--recipe", "lora", "--gpus", "8", "--strategy", "auto", "--dry_run")
    assert done.code == 2 and "needs to know the GPUs" in done.err, done


# What `scontrol --oneliner show node` prints (22.05), shortened: nodes of other sizes and kinds in three partitions.
NODES = """\
NodeName=g1 CPUAlloc=0 CPUEfctv=124 CPUTot=128 Gres=gpu:h100:8(S:0-1) OS=Linux 6.1 #1 SMP RealMemory=1031000 \
AllocMem=0 MemSpecLimit=7000 State=IDLE Partitions=gpu,all Reason=Low RealMemory=1 [root@x]
NodeName=g2 CPUAlloc=0 CPUTot=96 Gres=gpu:h100:8,shard:h100:64 RealMemory=1030000 State=IDLE Partitions=gpu
NodeName=g3 CPUAlloc=0 CPUTot=16 Gres=gpu:4 RealMemory=64000 State=IDLE Partitions=gpu
NodeName=m1 CPUAlloc=0 CPUTot=56 Gres=gpu:a100_1g.10gb:7(S:0),gpu:a100:1 RealMemory=1 State=IDLE Partitions=mig
NodeName=c1 CPUAlloc=0 CPUTot=64 Gres=(null) RealMemory=500000 State=IDLE Partitions=cpu,all
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node: stand-ins for the two commands that tell what the nodes have."""
    (tmp_path / "nodes").write_text(NODES)
    for name, text in (("scontrol", f"cat {tmp_path}/nodes"), ("sinfo", "echo cpu; echo gpu*; echo mig")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "partition", "share"),
    [
        ("8", None, (12, 125)),  # 96 / 8 cores of g2, (1,031,000 - 7,000) / 8 MiB of g1
        ("h100:8", "all", (15, 125)),
        ("4", None, (4, 15)),
        ("h100:4", "gpu", (12, 125)),
        ("a100_1g.10gb:7", "mig", (7, 0)),  # what Slurm says where nobody told it the memory: 1 MiB
        ("9", None, None),
        ("1", "cpu", None),
        ("1", "nix", None),
    ],
)
def test_a_gpus_share_of_a_node(slurm: Path, gpus: str, partition: str | None, share: tuple | None) -> None:
    """Guards `submit.py` against asking for more than any node has for its GPUs."""
    assert queue.gpu_share(gpus, partition) == share


@pytest.mark.parametrize("said", ["", "exit 1", "echo NodeName=x Gres=gpu:8", "head -c 999 /dev/urandom", "sleep 60"])
def test_a_slurm_that_does_not_answer_keeps_nobody_from_submitting(slurm: Path, said: str, monkeypatch) -> None:
    monkeypatch.setattr(queue, "PATIENCE", 0.2)
    (slurm / "scontrol").write_text(f"#!/bin/sh\n{said}\n")
    (slurm / "sinfo").write_text(f"#!/bin/sh\n{said}\n")
    assert queue.gpu_share("8", None) in (None, (0, 0))


def test_submit_asks_for_what_the_ranks_need(slurm: Path) -> None:
    """Guards host memory: a node of 8 GPUs got four cores and Slurm's default. In fp32 each rank loads 32 GB of an 8B
    model, but under ZeRO-3; where the node has less, no strategy that needs more is queued or taken by `auto`."""
    full = ("--recipe", "models/llama-3.1-8b/full", "--gpus", "h100:8", "--dry_run")
    done = script("submit", *full, "--strategy", "fsdp", "--partition", "all")
    assert done.code == 0 and "--cpus-per-gpu=8 --mem-per-gpu=125G" in done.out, done
    (slurm / "nodes").write_text(NODES.replace("RealMemory=1031000", "RealMemory=257000"))
    done = script("submit", *full, "--strategy", "zero2", "--partition", "all")
    assert done.code == 2 and "zero2 takes 34 GiB of host memory per rank" in done.err and "zero3" in done.err, done
    assert "share of a node is 30" in done.err and "Traceback" not in done.err
    done = script("submit", *full, "--strategy", "auto", "--partition", "all")
    assert "# plan: fsdp" in done.out and "--mem-per-gpu=30G" in done.out, done  # whose rank 0 alone reads them
    done = script("submit", *full, "--strategy", "zero2", "--partition", "all", "--mem_per_gpu", "40G", "--cpus", "32")
    assert "--gpus-per-node=h100:8 --cpus-per-task=32 " in done.out and "--mem-per-gpu=40G" in done.out, done
    done = script("submit", *full[:2], "--gpus", "8", "--dry_run", SBATCH_CPUS_PER_GPU="4", SBATCH_MEM_PER_CPU="4G")
    assert done.code == 0 and "cpus-per" not in done.out.splitlines()[0] and "mem" not in done.out.splitlines()[0]
    for words, said in (
        (("--cpus", "8", "--cpus_per_gpu", "4"), "not allowed with"),
        (("--mem_per_gpu", "4G"), "--mem_per_gpu without GPUs"),
        (("--gpu_memory", "40"), "--gpu_memory without GPUs"),
    ):
        done = script("submit", "--recipe", "lora", *words, "--dry_run")
        assert done.code == 2 and said in done.err and "Traceback" not in done.err, done


def test_ranks_without_a_gpu_of_their_own_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a node that is called sick because of how the job asked for GPUs, and slices of a GPU (MIG):
    `nvidia-smi --id` takes no UUID of one, and a process sees one of them, whatever it is given."""
    with pytest.raises(errors.LaunchError, match=r"1 GPU\(s\) for its ranks, and the job starts 8"):
        health.check_step(1, 8)
    health.check_step(8, 8)
    # as NVIDIA's MIG user guide shows `nvidia-smi -L`
    slices = ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77/1/0")
    (tmp_path / "nvidia-smi").write_text(
        f"#!/bin/sh\n[ $# = 1 ] && [ $1 = --list-gpus ] || {{ echo No devices were found; exit 6; }}\n"
        f"echo '  MIG 1g.5gb Device 0: (UUID: {slices[0]})'; echo '  MIG 1g.5gb Device 1: (UUID: {slices[1]})'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    for name in slices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        health.check_step(1, 1)
        assert health.check_gpus(1) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-gone")
    assert health.check_gpus(1) == ["MIG-gone does not answer"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(slices))
    with pytest.raises(errors.LaunchError, match="2 ranks on 2 slices"):
        health.check_step(2, 2)


def test_a_sick_node_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards each check of a node's health, with a stand-in for nvidia-smi."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}")

    def smi(text: str) -> list[str]:
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        return health.check_gpus(2)

    assert smi("echo 0, 10; echo 1, 20") == []
    warning = "echo 'WARNING: infoROM is corrupted at gpu 0000:41:00.0, serial 1, board 2'; printf '\\377\\n'"
    assert smi(f"{warning}; echo 0, 10; echo 1, '[N/A]'; {warning}") == []
    assert smi(f"{warning}; echo 0, 10") == smi("echo 0, 10") == ["1 of 2 GPUs answer"]
    assert smi("echo 0, 10; echo 1, 70000") == ["70,000 MiB of GPU 1 are in use by others"]
    assert smi("echo Failed to initialize NVML; exit 9") == ["nvidia-smi: Failed to initialize NVML"]
    assert health.check_gpus(0) == []
    tool.write_text("no script, and no program")
    assert health.check_gpus(2) == ["nvidia-smi: Exec format error"]

    assert health.check_disk([tmp_path]) == []
    (tmp_path / "file").touch()
    assert "cannot be written" in health.check_disk([tmp_path / "file"])[0]
    assert health.check_clock(time.time()) == []
    assert "its clock is" in health.check_clock(time.time() - 1000)[0]


# What `rocm-smi --showmeminfo vram --json` prints (marimo-team/marimo#9237, for two cards), and its `--json` under a
# low-power warning; `amd-smi metric --mem-usage --json` before ROCm 7 and since.
ROCM_SMI = """WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status

{"card0": {"VRAM Total Memory (B)": "68702699520", "VRAM Total Used Memory (B)": "USED"},
 "card1": {"VRAM Total Memory (B)": "68702699520", "VRAM Total Used Memory (B)": "27856896"},
 "system": {"Driver version": "6.3.6"}}
"""
AMD_SMI = """[{"gpu": 0, "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"}, "used_vram": {"value": USED,
 "unit": "MB"}, "free_vram": {"value": 196309, "unit": "MB"}}},
 {"gpu": 1, "mem_usage": {"total_vram": "N/A", "used_vram": "N/A", "free_vram": "N/A"}}]"""
AMD_ANSWERS = {
    "rocm-smi": (ROCM_SMI, 283 << 20, 6 << 30, "card0"),
    "amd-smi": (AMD_SMI, 283, 6144, "0"),
    "amd-smi of ROCm 7": (f'{{"gpu_data": {AMD_SMI}}}', 283, 6144, "0"),
}


@pytest.mark.parametrize("version", AMD_ANSWERS)
def test_a_node_of_amd_is_looked_at_by_its_own_tool(version: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Guards AMD's nodes against being called sick for want of nvidia-smi, and finds what is wrong with them; in every
    form of the answer, half of one, and none: what is not sure ends no job and is said."""
    answer, free, used, name = AMD_ANSWERS[version]
    tool, cat = tmp_path / version.split()[0], shutil.which("cat")
    monkeypatch.setenv("PATH", f"{tmp_path}")

    def check(text: str, wanted: int = 2, end: str = "") -> tuple[list[str], str]:
        tool.write_text(f"#!/bin/sh\n{cat} <<'END'\n{text}\nEND\n{end}\n")
        tool.chmod(0o755)
        return health.check_gpus(wanted), capsys.readouterr().err

    assert check(answer.replace("USED", str(free))) == ([], "")
    assert check(answer.replace("USED", str(used))) == ([f"6,144 MiB of GPU {name} are in use by others"], "")
    assert check(answer.replace("USED", str(used)), wanted=1) == ([], ""), "another job's, on a node that is shared"
    assert check(answer.replace("USED", str(free)), wanted=8) == (["2 of 8 GPUs answer"], "")
    for text, end, said in (
        (answer[:-60], "", "'s answer cannot be read"),
        ("", "", "'s answer cannot be read"),
        ("Unable to open /dev/kfd", "exit 1", ": Unable to open /dev/kfd"),
    ):
        faults, note = check(text, end=end)
        assert not faults and f"{tool.name}{said}" in note and "its 2 GPU(s) were not looked at" in note, note
    tool.write_text("no script, and no program")
    assert health.check_gpus(2) == [] and f"no {tool.name}" in capsys.readouterr().err
    tool.unlink()
    assert health.check_gpus(2) == []
    assert "no nvidia-smi, no amd-smi, no rocm-smi" in capsys.readouterr().err


def test_nodes_find_each_other_or_say_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the rendezvous: all nodes are heard before a rank starts, and the one that is not is named."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    found: dict[int, list[str]] = {}

    def node(number: int, nodes: list[str]) -> None:
        found[number] = health.check_rendezvous(nodes, number, port)

    three = ["localhost", "two", "three"]
    threads = [threading.Thread(target=node, args=(number, three)) for number in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [], 1: [], 2: []}

    monkeypatch.setattr(health, "PATIENCE", 1)
    threads = [threading.Thread(target=node, args=(number, three)) for number in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == ["within 1 s nothing came from three"]
    assert "cannot reach localhost" in found[1][0]
    assert hardware.interface("127.0.0.1") not in ("lo", "")  # where no other node is


def test_all_cards_of_a_network_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards nodes with several cards of one network (Slingshot's hsn0 to hsn3), of which NCCL took one; not a card
    that is down, nor one with a network of its own."""

    def card(address: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(family=socket.AF_INET6, address="fe80::1", netmask="ffff::"),
                SimpleNamespace(family=socket.AF_INET, address=address, netmask="255.255.0.0")]  # fmt: skip

    cards = {
        "lo": card("127.0.0.1"),
        "hsn10": card("10.253.0.9"),
        "nmn0": card("10.252.1.67"),
        **{f"hsn{number}": card(f"10.253.1.{number}") for number in range(4)},
    }
    cards["hsn4"] = card("10.77.1.1")
    monkeypatch.setattr("psutil.net_if_addrs", lambda: cards)
    up = {name: SimpleNamespace(isup=name != "hsn3") for name in [*cards, "tunnel7"]}
    monkeypatch.setattr("psutil.net_if_stats", lambda: up)
    assert hardware.interfaces_beside("hsn0") == ["hsn0", "hsn1", "hsn2", "hsn10"]
    assert hardware.interfaces_beside("nmn0") == ["nmn0"] and hardware.interfaces_beside("hsn4") == ["hsn4"]


def test_a_helper_of_a_rank_does_not_die_of_the_queues_signal() -> None:
    """Guards SIGUSR1 to every process of a job, as Slurm sends it: a compiler that a rank has started must not die
    of it, and the rank must still hear it."""
    code = (
        "import os, subprocess, signal, time\n"
        "from stepladder.training.guard import signals\n"
        "signals.install()\n"
        "helper = subprocess.Popen(['sleep', '0.5'])\n"
        "os.kill(helper.pid, signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "assert helper.wait() == 0, helper.returncode\n"
        "assert signals.stop_asked() and signals.asked == 'SIGUSR1'\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


@pytest.mark.proof
def test_a_build_that_was_killed_does_not_hold_up_every_later_start(tmp_path: Path) -> None:
    """Guards ZeRO on CPU: torch's lock file outlives the process that made it, and each later start waits for it."""
    leftover = tmp_path / "py/deepspeed_shm_comm/lock"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    code = (
        "from stepladder.training.launch import devices, launcher\n"
        "devices.choose_device(launcher.Launch(1, 0, 0, 1, launcher.Strategy('zero2')))"
    )
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "py"), "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, timeout=300)
    assert not leftover.exists()
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    # The system's ninja hashes a command in another way than the one installed with it, and built all of it again.
    env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if p != str(Path(sys.executable).parent))
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, timeout=300)
    assert built.stat().st_mtime_ns == before


def test_every_sweep_file_is_yaml_with_its_own_command() -> None:
    for file in (ROOT / "slurm/sweeps").glob("*.yaml"):
        assert yaml.safe_load(file.read_text())["grid"]
        assert f"--sweep slurm/sweeps/{file.name}" in file.read_text()


@pytest.mark.parametrize(
    ("recipe", "merges"), [("lora", []), ("qlora", ["--quantized_base", "dequantized"]), ("sft", None)]
)
def test_how_the_pipeline_merges(recipe, merges, tmp_path, monkeypatch, capfd) -> None:
    """Guards the second job of pipeline.sh: of QLoRA it was refused after hours of training, and of a full fine-tuning
    there is nothing to merge. The words are read as the script reads them, by a shell."""
    folder = tmp_path / "my run"
    monkeypatch.setattr(sys, "argv", ["job", "merge", "--recipe", recipe, "--output_dir", str(folder)])
    job.main()
    words = subprocess.run(["bash", "-c", f'merge_it=({capfd.readouterr().out}); printf "%s\\n" "${{merge_it[@]:2}}"'],
                           capture_output=True, text=True, check=True).stdout.splitlines()  # fmt: skip
    expected = ["--adapter", str(folder), "--output_dir", f"{folder}/merged", *(merges or [])]
    assert words == ([""] if merges is None else expected)


def test_a_sweeps_words_reach_the_script_as_they_are(tmp_path: Path) -> None:
    """Guards sweep.sbatch, which reads words that end with NUL: what is printed for people has none."""
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"recipe": "lora", "report_to": "wandb", "grid": {"run_name": ["a b\tc"]}}))
    done = subprocess.run(
        [sys.executable, "-m", "stepladder.cluster.job", "element", "0", file], cwd=ROOT, capture_output=True
    )
    words = done.stdout.decode().split("\0")
    assert done.returncode == 0 and words[:2] == ["--recipe", "lora"] and words[-1] == "", done
    assert words[words.index("--run_name") + 1] == "a b\tc"
