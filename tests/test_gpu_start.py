"""Start-up on machines with GPUs that are not there: each way in, up to the first tensor on a device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_stand_in
import pytest
from gpu_stand_in import T4, ends_on_device

import same_curve
from conftest import ROOT, run

TINY_RUN = ("--max_steps", "2", "--overwrite", "--model_name_or_path")


def on_machines(folder: Path, jobs: dict[str, dict[str, Any]], ranks: int = 1) -> dict[str, tuple[int, str]]:
    """Exit code and output (of all ranks) of each job."""
    listed = [
        {**job, "port": same_curve.free_port(), "log": str(folder / f"{name}.log")}
        for name, job in jobs.items()
    ]  # fmt: skip
    same_curve.launch_many(
        "plain" if ranks == 1 else "ddp", ranks, listed, folder / "jobs.json", "tests/gpu_stand_in.py"
    )
    found = {}
    for name in jobs:
        logs = [folder / f"{name}.log{f'.{rank}' if rank else ''}" for rank in range(ranks)]
        failed = folder / f"{name}.log.failed"
        text = "\n".join(log.read_text() for log in logs if log.exists())
        found[name] = (int(failed.read_text()) if failed.exists() else 0), text
    return found


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """One process on machines of 1, 2 and 8 GPUs, forked from one that has imported the libraries."""
    folder = tmp_path_factory.mktemp("alone")

    def sft(name: str, *words: str, **job: Any) -> dict[str, Any]:
        argv = ["--recipe", "sft", *TINY_RUN, str(tiny), "--output_dir", str(folder / name), *words]
        return {"argv": argv, **job}

    jobs = {f"sft-{gpus}": sft(f"sft-{gpus}", gpus=gpus) for gpus in (1, 2, 8)}
    jobs["third"] = sft("third", gpus=8, visible="3")
    jobs["two"] = sft("two", gpus=8, visible="2,3")
    jobs |= {name: sft(name, gpus=8, visible=name) for name in ("9", "GPU-gone")}
    jobs["none"] = sft("none", gpus=2, visible="")
    jobs["t4"] = sft("t4", gpus=1, card=T4)
    jobs["qlora"] = {**sft("qlora", gpus=2), "argv": [*sft("qlora")["argv"], "--recipe", "qlora"]}
    for gpus in (1, 2, 8):
        words = ["--recipe", "sft", "--model_name_or_path", str(tiny)]
        jobs[f"check-{gpus}"] = {"script": "scripts/check.py", "argv": words, "gpus": gpus}
    jobs["plan"] = {"script": "scripts/plan.py", "argv": [*words, "--gpus", "2"], "gpus": 8}
    words = ["--recipe", "sft", "--gpus", "h100:4", "--dry_run"]
    jobs["submit"] = {"script": "scripts/submit.py", "argv": words, "gpus": 8}
    words = ["--model", str(tiny), "--prompt", "Where is my order?"]
    jobs["generate"] = {"script": "scripts/generate.py", "argv": words, "gpus": 1}
    return on_machines(folder, jobs)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_one_process_takes_the_first_gpu(gpus: int, alone: dict) -> None:
    """Guards the first command on a machine with GPUs, as far as the model's way to the device: CUDA is touched after
    CUDA_VISIBLE_DEVICES is set, since it reads that once, and precision and plan are the GPU's."""
    code, said = alone[f"sft-{gpus}"]
    assert code == 1 and ends_on_device(said) == 1, said
    assert re.findall("CUDA touched.*", said) == ["CUDA touched, CUDA_VISIBLE_DEVICES=0, 1 seen"]
    assert (f"note: {gpus} GPUs are here" in said) == (gpus > 1)
    assert re.search(r"1 rank under single: \S+:cuda:0\n", said) and "precision   bf16" in said


def test_one_process_where_the_variable_is_set(alone: dict) -> None:
    """Guards a user's or a scheduler's choice of the GPU: one is taken as it is, of two none is chosen without a word,
    none means a CPU, and a GPU that is not there is refused: the run trained on the CPU."""
    code, said = alone["third"]
    assert ends_on_device(said) == 1 and "CUDA_VISIBLE_DEVICES=3, 1 seen" in said and "GPUs are here" not in said, said
    code, said = alone["two"]
    assert code == 2 and "one process sees 2 GPUs" in said and "--num_processes 2" in said, said
    code, said = alone["none"]
    assert code == 0 and ":cpu" in said and "✔ 2 steps" in said, said
    for name in ("9", "GPU-gone"):
        code, said = alone[name]
        assert code == 2 and f"CUDA_VISIBLE_DEVICES={name} names no GPU" in said and ":cpu" not in said, said


def test_a_gpu_without_bf16_computes_in_fp16(alone: dict) -> None:
    """Guards the T4 of the free notebooks: `bf16: auto` there is fp16."""
    assert "precision   fp16" in alone["t4"][1] and ends_on_device(alone["t4"][1]) == 1, alone["t4"]


def test_a_quantized_base_and_an_answer_go_to_the_gpu(alone: dict) -> None:
    """Guards QLoRA's base, which is quantized on the device, and generate.py against staying on the CPU."""
    for name in ("qlora", "generate"):
        code, said = alone[name]
        assert code != 0 and ends_on_device(said) == 1, said


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_what_is_asked_before_the_run(gpus: int, alone: dict) -> None:
    """Guards check.py, which plans for the GPUs of this machine."""
    code, said = alone[f"check-{gpus}"]
    ranks = "single on 1 rank," if gpus == 1 else f"ddp on {gpus} ranks,"
    assert code == 0 and ranks in said and "GiB of h100" in said, said


def test_a_login_node_s_gpus_are_left_alone(alone: dict) -> None:
    """Guards plan.py and submit.py, which ask about another machine, against touching this one's GPUs."""
    for name in ("plan", "submit"):
        code, said = alone[name]
        assert code == 0 and "CUDA touched" not in said, said


def test_two_ranks(tiny: Path, tmp_path: Path) -> None:
    """Guards `accelerate launch`: each rank on a GPU of its own where there are enough, else each refuses before they
    meet, with its exit code and the number to type."""
    jobs = {
        str(gpus): {
            "argv": ["--recipe", "sft", *TINY_RUN, str(tiny), "--output_dir", str(tmp_path / str(gpus))],
            "gpus": gpus,
        }
        for gpus in (1, 2, 8)
    }
    found = on_machines(tmp_path, jobs, ranks=2)
    code, said = found["1"]
    assert code == 2 and said.count("2 ranks on a machine with 1 GPU\n") >= 1 and "--num_processes 1" in said, said
    for gpus in ("2", "8"):
        code, said = found[gpus]
        assert re.search(r"2 ranks under ddp: \S+:cuda:0, \S+:cuda:1\n", said) and ends_on_device(said) == 2, said
        assert "GPUs are here" not in said and "precision   bf16" in said


def test_imports_do_not_touch_cuda_first(tiny: Path, tmp_path: Path) -> None:
    """Guards the order of sft.py's own imports, which the forks above share: in a process of its own, on a machine of
    eight, no library may touch CUDA before the variable is set (bitsandbytes does when it is imported)."""
    env = gpu_stand_in.environment(tmp_path / "machine", 8)
    done = run(sys.executable, "scripts/sft.py", "--recipe", "qlora", *TINY_RUN, tiny,
               "--output_dir", tmp_path / "run", **env)  # fmt: skip
    assert re.findall("CUDA touched.*", done.err) == ["CUDA touched, CUDA_VISIBLE_DEVICES=0, 1 seen"], done
    assert "note: 8 GPUs are here" in done.out and ends_on_device(done.err) == 1, done


@pytest.mark.parametrize(
    ("gpus", "wanted", "visible", "used", "said"),
    [
        (1, 1, None, 4, ""),
        (8, 8, None, 4, ""),
        (8, 2, "2,3", 4, ""),
        (2, 8, None, 4, "2 of 8 GPUs answer"),
        (2, 2, "0,5", 4, "nvidia-smi: No devices were found"),
        (1, 1, None, 40_000, "40,000 MiB of GPU 0 are in use by others"),
    ],
)
def test_a_node_s_gpus(gpus: int, wanted: int, visible: str | None, used: int, said: str, tmp_path: Path) -> None:
    """Guards the check of a node before its ranks, as slurm/node.sh calls it."""
    env = {**gpu_stand_in.environment(tmp_path, gpus), "STAND_IN_USED": str(used)}
    env |= {"STEPLADDER_NODES": "here", "SLURM_NODEID": "0", "STEPLADDER_GPUS": str(wanted)}
    env |= {"SLURM_GPUS_ON_NODE": str(wanted), "STEPLADDER_PORT": "1"}
    env |= {"STEPLADDER_FOLDER": str(tmp_path), "STEPLADDER_CLOCK": subprocess.getoutput("date +%s")}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = run(sys.executable, "-m", "stepladder.cluster.health", **env)
    assert (done.code, said in done.err) == (2 if said else 0, True), done


def test_deepspeed_is_installed_without_a_toolkit(tmp_path: Path) -> None:
    """Guards `make install` with a driver and no CUDA toolkit: DeepSpeed's setup asks each of its builders whether it
    can compile (`builder.is_compatible()`, setup.py), and those for CUDA raise where there is no nvcc."""
    (line,) = re.findall(r"^\t@(.*)\$\(PIP_INSTALL\) .*deepspeed", (ROOT / "Makefile").read_text(), re.MULTILINE)
    given = dict(word.split("=") for word in line.split())
    code = (
        "from deepspeed.ops.op_builder.all_ops import ALL_OPS\n"
        "for builder in ALL_OPS.values():\n"
        "    try:\n"
        "        builder.is_compatible()\n"
        "    except Exception as error:\n"
        "        print('cannot be asked:', type(error).__name__)\n"
        "print(len(ALL_OPS), 'asked')"
    )
    machine = {**gpu_stand_in.environment(tmp_path, gpus=1), "CUDA_HOME": "", "CUDA_PATH": ""}
    bare, ours = (run(sys.executable, "-c", code, **machine, **words) for words in ({"DS_ACCELERATOR": "cuda"}, given))
    assert "MissingCUDAException" in bare.out, bare  # else nothing is shown here
    assert ours.code == 0 and "cannot be asked" not in ours.out and re.search(r"[1-9]\d* asked", ours.out), ours
