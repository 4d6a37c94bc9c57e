"""A run on a CPU starts anew under tcmalloc where the machine has it, and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import losses, manifest, run, script
from stepladder.errors import LaunchError
from stepladder.training.launch import devices
from stepladder.training.launch.launcher import Launch, Strategy

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or any(Path(gpu).exists() for gpu in devices.GPUS), reason="for Linux without a GPU"
)
STARTS = """
import json, os, sys
from stepladder.training.launch import devices
with open(sys.argv[1], "a") as log:
    log.write(json.dumps([os.getpid(), devices.allocator_name(), os.environ.get("LD_PRELOAD")]) + "\\n")
devices.use_tcmalloc()
with open(sys.argv[1], "a") as log:
    log.write(json.dumps([os.getpid(), devices.allocator_name(), os.environ.get("LD_PRELOAD"), sys.argv[2:]]) + "\\n")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library by tcmalloc's name that changes nothing: what is tested is that it is loaded before all else."""
    folder = tmp_path_factory.mktemp("lib")
    (folder / "empty.c").write_text("int nothing;\n")
    made = ["cc", "-shared", "-fPIC", "-o", folder / devices.TCMALLOC[0], folder / "empty.c"]
    subprocess.run(made, check=True)
    return folder


def test_the_process_starts_anew_once_and_its_commands_do_not_inherit_it(library: Path, tmp_path: Path) -> None:
    """Guards against a start that goes round for ever, loses its arguments or its id, or preloads what it runs."""
    log, file = tmp_path / "log", tmp_path / "starts.py"
    file.write_text(STARTS)
    done = run(sys.executable, file, log, "--a", "b c", LD_LIBRARY_PATH=str(library))
    assert done.code == 0, done
    first, again, after = (json.loads(line) for line in log.read_text().splitlines())
    assert first[1:] == ["libc", None]
    assert again[1:] == ["tcmalloc", devices.TCMALLOC[0]]
    assert after[1:] == ["tcmalloc", None, ["--a", "b c"]]
    assert first[0] == again[0] == after[0], "the process that was started is the one that ends"


def test_a_preload_of_the_user_stays(library: Path, tmp_path: Path) -> None:
    """Guards someone's own choice of an allocator, and the way to do without."""
    log, file = tmp_path / "log", tmp_path / "starts.py"
    file.write_text(STARTS)
    done = run(sys.executable, file, log, LD_LIBRARY_PATH=str(library), LD_PRELOAD="libc.so.6")
    assert done.code == 0, done
    first, after = (json.loads(line) for line in log.read_text().splitlines())
    assert first[1:] == ["libc", "libc.so.6"] and after[1:3] == ["libc", "libc.so.6"]


def test_a_run_has_the_same_curve_under_it(library, tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards the whole way: sft.py starts anew, its manifest names the allocator, and nothing else differs.

    With the real one where it is, as in CI.
    """
    recipe = write_recipe(
        model_name_or_path=str(tiny), dataset_name=str(learnable), max_steps=2, global_batch_size=4, learning_rate=0.01,
        max_length=192, logging_steps=1, eval_strategy="no", save_strategy="no",
    )  # fmt: skip
    curves, found = [], {} if devices.tcmalloc_environment() else {"LD_LIBRARY_PATH": str(library)}
    for name, env in {"tcmalloc": found, "libc": {"LD_PRELOAD": "libc.so.6"}}.items():
        done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / name, cold=True, **env)
        assert done.code == 0, done
        assert manifest(tmp_path / name)["allocator"] == name
        curves.append(losses(tmp_path / name))
    assert curves[0] == curves[1] and len(curves[0]) == 2


@pytest.mark.parametrize(
    ("gpu", "set_before", "after"),
    [
        (True, {}, "expandable_segments:True"),
        (True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        (False, {}, None),
    ],
)
def test_segments_grow_on_a_gpu_unless_someone_says_otherwise(gpu, set_before, after, tmp_path, monkeypatch) -> None:
    """Guards a GPU outside Slurm too, where this was left to the user; and the user's own word, by either name."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is set here
        monkeypatch.delenv(name)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "GPUS", (str(tmp_path if gpu else tmp_path / "none"), "none"))
    devices.let_segments_grow()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == after


ONE = Launch(1, 0, 0, 1, Strategy("single"), 1)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no GPU, and is put back."""
    for name in devices.VISIBLE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("name", "named"), [("ROCR_VISIBLE_DEVICES", "0"), ("HIP_VISIBLE_DEVICES", "0,1"),
                                             ("ZE_AFFINITY_MASK", "0.1")])  # fmt: skip
def test_no_maker_s_gpu_becomes_a_cpu_without_a_word(name, named, bare) -> None:
    """Guards AMD's and Intel's nodes with PyTorch's usual build, which has no such device: Slurm names the GPUs of a
    job by these variables, and the job trained on the CPU. `use_cpu: true` does, and hides AMD's GPUs too."""
    bare.setenv(name, named)
    with pytest.raises(LaunchError, match=f"{name}={named} names no GPU"):
        devices.choose_device(ONE)
    assert devices.choose_device(ONE, use_cpu=True)
    assert os.environ["HIP_VISIBLE_DEVICES"] == "-1", "an empty one shows all, by HIP's documentation"
    bare.setattr(torch.xpu, "is_available", lambda: True)
    with pytest.raises(LaunchError, match="Intel"):
        devices.choose_device(ONE)


def test_one_process_on_a_node_of_amd_takes_the_first_gpu(bare) -> None:
    """Guards HIP_VISIBLE_DEVICES, by which PyTorch's build for ROCm counts where Slurm has set ROCR_VISIBLE_DEVICES
    (`torch.cuda._parse_visible_devices`): CUDA_VISIBLE_DEVICES left two GPUs, and one process refuses two."""
    bare.setattr(torch.version, "hip", "6.4")
    bare.setenv("ROCR_VISIBLE_DEVICES", "4,5")
    bare.setattr(torch.cuda, "device_count", lambda: len(torch.cuda._parse_visible_devices()))
    bare.setattr(torch.cuda, "is_available", lambda: True)
    assert not devices.choose_device(ONE)
    assert os.environ["HIP_VISIBLE_DEVICES"] == "0" and "CUDA_VISIBLE_DEVICES" not in os.environ


# Each rank is a fork of one process that has imported torch; a thread of it was there before, as a library's would be.
BINDS = """
import json, os, sys, threading
from pathlib import Path
from types import SimpleNamespace
import torch
from stepladder.training.launch import devices
from stepladder.training.launch.launcher import Launch, Strategy

os.environ["TORCHELASTIC_RUN_ID"] = "none"
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda number: SimpleNamespace(
    pci_domain_id=0, pci_bus_id=number + 10, pci_device_id=0
)
for case, (job, cards) in enumerate(json.loads(sys.argv[1])):
    folder = Path(sys.argv[2], str(case))
    for number, cores in enumerate(cards):
        card = folder / f"bus/pci/devices/0000:{number + 10:02x}:00.0"
        card.mkdir(parents=True)
        (card / "local_cpulist").write_text(cores + "\\n")
    for rank in range(len(cards)):
        if os.fork() == 0:
            os.sched_setaffinity(0, job)
            go, thread = threading.Event(), []
            worker = threading.Thread(target=lambda: (go.wait(), thread.append(os.sched_getaffinity(0))))
            worker.start()
            os.environ["RANK"] = str(rank)
            devices.bind_near_gpu(Launch(len(cards), rank, rank, len(cards), Strategy("ddp")), folder)
            go.set(), worker.join()
            assert thread[0] == os.sched_getaffinity(0), thread
            print(json.dumps([case, rank, sorted(thread[0])]), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def test_ranks_stay_near_their_gpus_and_within_the_job(tmp_path) -> None:
    """Guards the cores of each rank: near its GPU by the kernel's own list, never outside the job's, and no rank on a
    core that another needs where the job has more; threads that were there before come along."""
    first, second = range(2)  # not this worker's own core alone (conftest.py)
    both = [first, second]
    cases: list[tuple[list[int], list[str], list[list[int]], str]] = [  # of the job, near each GPU, of each rank
        (both, [f"{first}", f"{second}"], [[first], [second]], "cores  "),
        (both, [f"{second},500-600", f"{first}"], [[second], [first]], "cores  "),
        (both, [f"{first}"] * 2 + [f"{second}"] * 2, [[first]] * 2 + [[second]] * 2, "cores  "),
        (both, [f"{first},{second}"] * 2, [both] * 2, ""),
        (both, [f"{first}", f"{first}"], [both] * 2, "note: "),
        ([second], [f"{first}", f"{second}"], [[second]] * 2, "note: "),
        (both, ["", f"{first}"], [both] * 2, ""),
    ]
    asked = json.dumps([(job, cards) for job, cards, *_ in cases])
    done = run(sys.executable, "-c", BINDS, asked, tmp_path)
    assert done.code == 0, done
    said, found = "", []
    for line in done.out.splitlines():
        if not line.startswith("["):
            said = line
            continue
        case, rank, cores = json.loads(line)
        assert cores == cases[case][2][rank], (cases[case], done)
        if rank == 0:  # which has said what all do
            assert bool(said) == bool(cases[case][3]) and said.startswith(cases[case][3]), (cases[case], done)
        said = ""
        found.append((case, rank))
    assert found == [(case, rank) for case, one in enumerate(cases) for rank in range(len(one[1]))]
