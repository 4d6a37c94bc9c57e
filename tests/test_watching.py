"""What a person sees of a run: in the terminal, by --watch, by a profile, and by a callback of their own."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from conftest import ROOT, manifest, metrics, script
from stepladder import hardware, run
from stepladder.model.flops import Flops
from stepladder.reporting import runs
from stepladder.training.watch import telemetry
from stepladder.training.watch.telemetry import Work

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny, learnable) -> tuple[Path, str]:
    """A run on a pseudo-terminal, with a profile and the callback of the docs; and what it showed."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    recipe = folder.with_name("recipe.yaml")
    keys = {"model_name_or_path": str(tiny), "dataset_name": str(learnable), "eval_dataset_name": str(learnable),
            "max_steps": 6, "max_length": 192, "global_batch_size": 5, "per_device_train_batch_size": 3,
            "bf16": False, "padding_free": False, "logging_steps": 1, "use_peft": True,
            "lora_target_modules": "all-linear", "eval_strategy": "epoch", "save_strategy": "no",
            "gradient_checkpointing": True}  # fmt: skip
    recipe.write_text(json.dumps(keys))
    words = ["--recipe", recipe, "--output_dir", folder, "--profile", "--callback", "docs/prometheus.py"]
    code, shown = on_a_terminal(*words)
    assert code == 0, shown
    return folder, without_codes(shown)


def on_a_terminal(*words: str | Path, kind: str = "xterm") -> tuple[int, str]:
    """Run sft.py on a pseudo-terminal of a kind: its exit code, and what it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "scripts/sft.py", *map(str, words)],
        cwd=ROOT, stdout=theirs, stderr=subprocess.STDOUT, env={**os.environ, "TERM": kind, "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux' way to say that the other side is closed
        pass
    return process.wait(60), shown.decode()


def without_codes(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_the_line_on_a_terminal(watched) -> None:
    """Guards the figures of the line, and the three commands that come next."""
    _, shown = watched
    assert re.search(r"6/6 .*loss \d\.\d{4}[↓↑ ] lr \S+  [\d,]+ tok/s  \d\.\d GiB  0:00 left", shown)
    for command in ("generate.py", "compare.py", "merge.py"):
        assert f"python scripts/{command}" in shown


def test_the_block_at_the_start(watched) -> None:
    """Guards what is said before anything happens: method, length, checkpoints, trackers, planned memory."""
    folder, shown = watched
    assert "run         LoRA, 6 steps (3 epochs), no checkpoints\r\n" in shown
    memory = manifest(folder)["plan"]["peak_memory_bytes"] / 2**30
    assert f"watch       metrics.jsonl; {memory:.1f} GiB of tensors planned at most on a rank\r\n" in shown


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_failure_on_a_terminal(kind, watched, tmp_path) -> None:
    """Guards the error against standing in the progress line, a terminal that can move no cursor against one, and the
    losses, which stay on the screen: pages and people watch them fall."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from transformers import TrainerCallback\nclass Callback(TrainerCallback):\n"
        "  def on_step_end(self, args, state, control, **kwargs):\n    assert state.global_step < 3\n"
    )
    recipe = watched[0].with_name("recipe.yaml")
    code, shown = on_a_terminal("--recipe", recipe, "--output_dir", tmp_path / "run", "--callback", mine, kind=kind)
    lines = [line.strip() for line in without_codes(shown).split("\n")]
    assert code == 1 and "Traceback (most recent call last):" in lines, shown
    assert ("\x1b" in shown) == (kind == "xterm") and "step     2/6  loss" in without_codes(shown), shown


FULL_DISK = """
import resource
from pathlib import Path
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):  # in steps 2 and 3 a file takes ten bytes more
        size = (Path(args.output_dir) / "metrics.jsonl").stat().st_size + 10
        limit = size if state.global_step in (1, 2) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
"""


def test_a_disk_that_is_full_for_a_while(watched, tmp_path) -> None:
    """Guards the run against it: said once, no half line, and what could not be written comes later."""
    (tmp_path / "mine.py").write_text(FULL_DISK)
    words = ["--recipe", watched[0].with_name("recipe.yaml"), "--output_dir", tmp_path / "run", "--eval_strategy", "no"]
    done = script("sft", *words, "--callback", tmp_path / "mine.py")
    assert done.code == 0 and done.out.count("the run goes on, and tries again") == 1, done
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_stays_full(tmp_path, monkeypatch) -> None:
    """Guards the first error, which that of writing it down does not hide, and a run whose end is not on the disk."""
    from stepladder.errors import TrainingError

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_atomic", full)
    record = run.Run(tmp_path, is_writer=True)
    record.manifest = {"status": "running"}
    with pytest.raises(ZeroDivisionError), record.recording():
        raise ZeroDivisionError
    record.manifest = {"status": "running"}
    with pytest.raises(TrainingError, match="No space left on device"), record.recording():
        record.log({"step": 1})


def test_a_profile_names_the_largest_costs(watched) -> None:
    folder, shown = watched
    assert len(re.findall(r"\d\.\d %  [\d,.]+ ms in [\d,]+ calls of ", shown)) == 5
    assert json.loads((folder / "profile.json").read_text())["traceEvents"]


def test_a_profile_counts_once_on_a_gpu(tmp_path, capsys) -> None:
    """Guards the shares: a kernel's time stands with its operator, with itself and with an annotation around both."""
    from torch.autograd import DeviceType

    from stepladder.training.watch import terminal

    def one(key: str, device: DeviceType, microseconds: int, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation, count=1,
                               self_device_time_total=microseconds, self_cpu_time_total=7)  # fmt: skip

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    found = [one("aten::mm", cpu, 3000), one("gemm", cuda, 3000), one("aten::add", cpu, 1000), one("add", cuda, 1000),
             one("Optimizer.step", cpu, 4000, True), one("Optimizer.step", cuda, 4000, True)]  # fmt: skip
    head, *lines = terminal.cost_lines(found, 2)
    assert head == "  where 2 steps spend their time on the GPU:"
    assert [line.split("%")[0].strip() for line in lines] == ["75.0", "25.0"]

    profile, state = terminal.Profile(run.Run(tmp_path, is_writer=True)), SimpleNamespace(global_step=2, max_steps=2)
    for _ in range(2):
        profile.on_step_begin(None, state, None)
        profile.on_step_end(None, state, None)
    profile.on_train_end(None, state, None)
    assert "--profile recorded nothing" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, capfd) -> None:
    """Guards the run on a full disk, where the profiler leaves no file; here its folder is gone. The costs are told."""
    from stepladder.training.watch import terminal

    record = run.Run(tmp_path / "run", is_writer=True)
    profile = terminal.Profile(record)
    shutil.rmtree(record.folder, ignore_errors=True)
    for step in range(1, 5):
        profile.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=9), None)
        profile.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), None)
    shown = capfd.readouterr().out
    assert "time on the" in shown and f"could not be written: {record.folder / 'profile.json'}" in shown


def test_a_callback_of_ones_own(watched) -> None:
    """Guards the seam, by the example of the docs: its metric is in metrics.jsonl, and Prometheus' file is whole."""
    folder, _ = watched
    assert all("tokens_per_step" in row for row in metrics(folder) if "loss" in row)
    lines = (folder / "metrics.prom").read_text().splitlines()
    assert "stepladder_step 6" in lines and all(re.fullmatch(r"stepladder_\w+ \S+", line) for line in lines)


def test_the_callback_of_the_docs(tmp_path) -> None:
    """Guards what Prometheus refuses: a node's figure by its name, what is no number. The page shows the file."""
    from stepladder.training import arguments

    file = "docs/prometheus.py"
    assert f"```python\n{(ROOT / file).read_text()}```" in (ROOT / "docs/monitoring.md").read_text()
    (own,) = arguments.load_callback(str(ROOT / file))
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    logs = {"loss": 1.0, "tokens_per_second": 2.0, "step_seconds": 3.0, "node_0/cpu_percent": 4.0, "text": "x"}
    own.on_log(SimpleNamespace(output_dir=str(tmp_path)), state, None, logs=dict(logs))
    written = (tmp_path / "metrics.prom").read_text()
    assert "stepladder_node_0_cpu_percent 4.0\n" in written and "text" not in written and "/" not in written
    own.on_log(SimpleNamespace(output_dir=str(tmp_path / "missing")), state, None, logs=dict(logs))


def test_the_figures_agree(watched) -> None:
    """Guards the definitions: counts add up, empty places are padding, and recomputing counts in HFU alone."""
    folder, _ = watched
    rows, totals = [row for row in metrics(folder) if "loss" in row], manifest(folder)["totals"]
    assert rows[-1]["tokens"] == totals["tokens"] and rows[-1]["trained_tokens"] == totals["trained_tokens"]
    assert 0 < totals["trained_tokens"] < totals["tokens"]
    # 5 rows of about one length, then 3, in 6 places each; an empty one holds one pad token beside longer rows
    assert 0.2 < totals["padding"] < 0.5
    assert 0 < totals["mfu"] < totals["hfu"] < 1
    assert totals["peak_flops"] > 0 and "1024×1024 matrix products in fp32" in totals["peak_flops_source"]
    assert 0 < totals["step_seconds_p50"] <= totals["step_seconds_p90"] <= totals["step_seconds_p99"]
    assert [rows[-1]["peak_memory_bytes"]] <= totals["peak_memory_bytes"] and totals["data_wait_seconds"] >= 0
    assert totals["seconds"] == pytest.approx(sum(row["step_seconds"] for row in rows), rel=0.01)  # each is rounded


def test_operations_by_the_formula() -> None:
    """Guards 6 N for full fine-tuning and 4 N for frozen weights, and the second forward pass in HFU alone."""
    full = Work(Flops(parameters=100, trained=100, pair=0), recomputes=True, peak=1.0, peak_source="")
    assert full.shares(tokens=10, pairs=0, seconds=1.0) == (6000, 8000)
    lora = Work(Flops(parameters=100, trained=0, pair=5), recomputes=False, peak=1.0, peak_source="")
    assert lora.shares(tokens=10, pairs=3, seconds=1.0) == (4000 + 3 * 5 * 3,) * 2


# Names as drivers print them in public logs, with the dense bf16 (fp16) rate of the makers' data sheets, and GiB in
# "GPU 0 has a total capacity of …" of PyTorch's errors there.
DRIVER_NAMES = [
    ("NVIDIA H100 80GB HBM3", 989, 79.1), ("NVIDIA H100 NVL", 835, 93), ("NVIDIA H100 PCIe", 756, 79.1),
    ("NVIDIA H100", 989, 63.4), ("NVIDIA H20", 148, 95), ("NVIDIA H200", 989, 139.8), ("NVIDIA H200 NVL", 835, 139.8),
    ("NVIDIA GH200 480GB", 989, 94.5), ("NVIDIA GH200 120GB", 989, 94.5), ("NVIDIA GH200 144G HBM3e", 989, 140),
    ("NVIDIA B200", 2250, 178.3), ("NVIDIA B300 SXM6 AC", 2250, 267.7), ("NVIDIA GB200", 2500, 184.3),
    ("NVIDIA GB300", 2500, 276.5), ("NVIDIA A100-SXM4-80GB", 312, 79.2), ("NVIDIA A100 80GB PCIe", 312, 79.2),
    ("NVIDIA A100-SXM4-40GB", 312, 39.4), ("NVIDIA A100-PCIE-40GB", 312, 39.4), ("NVIDIA A100-SXM-64GB", 358, 63.4),
    ("NVIDIA A30", 165, 23.5), ("NVIDIA A10", 125, 22.1), ("NVIDIA A10G", 70, 22.1), ("NVIDIA A40", 149.7, 44.4),
    ("NVIDIA L4", 121, 22.2), ("NVIDIA L40", 181, 44.4), ("NVIDIA L40S", 362, 44.4), ("Tesla T4", 65, 14.6),
    ("NVIDIA RTX A6000", 154.8, 47.5), ("NVIDIA RTX 6000 Ada Generation", 364, 47.5), ("Quadro RTX 6000", None, 0),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8, 94.97),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9, 94.97),
    ("NVIDIA GeForce RTX 4090", 165.2, 23.6), ("NVIDIA GeForce RTX 4090 Laptop GPU", None, 0),
    ("NVIDIA GeForce RTX 5090", 209.5, 31.4), ("NVIDIA GeForce RTX 3090", 71, 23.7), ("NVIDIA RTX A4000", None, 0),
    ("Tesla V100-SXM2-16GB", 125, 15.8), ("Tesla V100-SXM2-32GB", 125, 31.7), ("Tesla V100-PCIE-32GB", 112, 31.7),
    ("AMD Instinct MI210", 181, 63.98), ("AMD Instinct MI250X", 191.5, 63.98), ("AMD Instinct MI300A", 980.6, 128),
    ("AMD Instinct MI300X", 1307, 191.9), ("AMD Instinct MI325X", 1307, 255.7), ("AMD Instinct MI355X", 2516, 287.98),
    # slices: sevenths and quarters of the multiprocessors, by the table in NVIDIA's MIG user guide; 9856 MiB in a log
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 989 / 7, 9.6), ("NVIDIA A100-SXM4-40GB MIG 1g.10gb", 312 / 7, 9.6),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 3 * 312 / 7, 19.6), ("NVIDIA A100-SXM4-40GB MIG 1c.3g.20gb", 312 / 7, 19.6),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb+me", 312 / 7, 9.5), ("NVIDIA A30 MIG 2g.12gb", 165 / 2, 11.7),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tflops", "memory"), DRIVER_NAMES)
def test_a_gpu_by_its_drivers_name(name, tflops, memory) -> None:
    """Guards against a variant that takes the row of a name that it begins with or holds, a slice that counts as its
    whole GPU, and memory that the driver does not have: a plan may be short of it by a twentieth, and never over."""
    row = hardware.gpu(name)
    assert (row and row.tflops) == (tflops and pytest.approx(tflops, rel=0.003))
    if row:
        assert 0.93 * memory < row.memory <= memory and row.source


def test_follow_a_run_that_is_written(tmp_path, monkeypatch) -> None:
    """Guards a line that is half written, one that is damaged, and a file that a resumption rewinds."""
    monkeypatch.setattr(runs, "POLL", 0.01)
    file, lines = tmp_path / "metrics.jsonl", runs.follow(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "running"}')
    file.write_text('{"step": 1, "loss": 2.0}\nnot json\n{"step": 2, "lo')
    assert "loss 2.0000" in next(lines)
    assert "line 2 is damaged" in next(lines)

    def later() -> None:
        time.sleep(0.1)
        with file.open("a") as out:
            out.write('ss": 1.5}\n')

    threading.Thread(target=later).start()
    assert "loss 1.5000" in next(lines)
    file.write_text('{"step": 1, "loss": 2.0}\n')
    assert "resumed" in next(lines)
    with file.open("a") as out:
        out.write('{"step": 3, "loss": 1.0}\n')
    (tmp_path / "run.json").write_text('{"status": "preempted"}')
    *rest, last = lines
    assert [line.split()[-1] for line in rest] == ["1.0000"]
    assert last.startswith("the run is preempted: started again it goes on")


def test_follow_a_run_that_is_removed(tmp_path, monkeypatch) -> None:
    """Guards --watch against waiting without end for a folder that somebody has removed."""
    monkeypatch.setattr(runs, "POLL", 0.01)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "running"}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    lines = runs.follow(folder)
    assert "loss 2.0000" in next(lines)
    shutil.rmtree(folder)
    assert list(lines) == [f"{folder} was removed"]


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"step": null}', '{"step": "3"}', '{"step": Infinity}', "\0\0"])
def test_a_line_that_is_damaged(line, tmp_path, capsys) -> None:
    """Guards --watch and a resumption against any content: left out and said, but for a last line that was cut off."""
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 2}}\n{line}')
    assert ["line 2 is damaged" in shown for shown in runs.follow(tmp_path)] == [False, True, False, False]
    record = run.Run(tmp_path, is_writer=True)
    record._rewind(1)
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n' and record.logged_until == 2
    assert "has 1 damaged line: left out" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "x = 1"])
def test_a_callback_that_is_none(content, tmp_path, tiny, learnable) -> None:
    """Guards a wrong --callback: one message, no traceback."""
    from stepladder.errors import LaunchError
    from stepladder.training import arguments

    file = tmp_path / "mine.py"
    if content:
        file.write_text(content)
    with pytest.raises(LaunchError, match="--callback"):
        arguments.check_flags([], str(file))
        arguments.load_callback(str(file))


def test_watch_by_the_command_line(watched) -> None:
    done = script("report", watched[0], "--watch")
    assert done.code == 0 and done.out.count("  loss ") == 6 and done.out.endswith("the run is finished\n"), done


def test_watch_where_there_is_no_run(tmp_path) -> None:
    """Guards a folder without run.json: one message, and no wait for what does not come."""
    done = script("report", tmp_path, "--watch")
    assert done.code == 2 and "run.json" in done.err and "Traceback" not in done.err, done


def test_a_folder_that_cannot_be_written_is_named_before_the_run(tmp_path: Path) -> None:
    """Guards the claim of the run folder: a file where a folder should be, and a place that takes none."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/run", Path("/proc/run")):
        done = script("sft", "--recipe", "lora", "--output_dir", place)
        assert done.code == 2 and f"{place} cannot be written" in done.err and "Traceback" not in done.err, done


def test_a_clock_that_jumps_changes_no_figure(tmp_path: Path, monkeypatch) -> None:
    """Guards the monotonic clock: with the machine's time set an hour back and forth, steps take what they take."""
    jumps, args = iter(range(10**6)), SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(time, "time", lambda: 1e9 + 3600 * (-1) ** next(jumps))
    meter = telemetry.Telemetry(run.Run(tmp_path / "run", is_writer=True))
    for _ in range(4):
        assert [*meter.batches(iter(["batch"]))] == ["batch"]
        time.sleep(0.002)
        meter.count(1, tokens=10, trained=5, places=16, pairs=50)
        meter.on_step_end(args, None, TrainerControl(should_log=True))
    found = meter.step_metrics("cpu")
    assert all(0 <= seconds < 60 for seconds in meter.step_seconds) and 0 < found["step_seconds"] < 60
    assert found["tokens"] == 40 and found["padding"] == 1 - 40 / 64 and found["tokens_per_second"] > 0


def test_what_is_in_a_step(tmp_path: Path, monkeypatch) -> None:
    """Guards the definitions by a clock of its own: waiting for data is in a step, an evaluation between two is not.

    The first batch of a start is not waited for, since workers are started then. What a GPU still does when a step is
    over counts where something else follows; a step that is followed by a step does not wait for it.
    """
    now, args = 0.0, SimpleNamespace(device=torch.device("cuda"))

    def takes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def loader(wait: float):
        for _ in range(2):
            takes(wait)
            yield "batch"

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: takes(0.5))
    meter = telemetry.Telemetry(run.Run(tmp_path / "run", is_writer=True))
    followed = {}, {"should_log": True}, {"should_training_stop": True}
    for wait, by in zip((1.0, 2.0, 3.0), followed, strict=True):
        for _ in meter.batches(loader(wait)):
            with meter.forward(torch.device("cpu")):
                takes(10.0)
        meter.count(1, tokens=10, trained=5, places=20, pairs=50)
        meter.on_step_end(args, None, TrainerControl(**by))
        takes(1000.0)  # an evaluation, or a checkpoint
    found, totals = meter.step_metrics("cpu"), telemetry.totals(meter, 3)
    assert [*meter.step_seconds] == [21.0, 24.5, 26.5] and totals["seconds"] == 72.0
    assert found["data_wait_seconds"] == totals["data_wait_seconds"] == 1 + 2 * 2 + 2 * 3
    assert found["tokens_per_second"] == round(30 / 72, 1) and found["padding"] == 0.5
    assert [totals[f"step_seconds_p{q}"] for q in (50, 90, 99)] == [24.5, 26.5, 26.5]


def test_the_figures_of_several_ranks_and_nodes(tmp_path: Path, monkeypatch) -> None:
    """Guards who is slow, the fullest rank, and each node's load, a GPU's too where it is known: two ranks on each of
    two nodes."""
    gathered = [
        (1.0, 2.0, 100.0, 50.0, 20.0, 80.0, 40.0), (1.0, 2.0, 300.0, 50.0, 20.0, 60.0, 60.0),
        (1.0, 7.0, 100.0, 10.0, 30.0, math.nan, 5.0), (2.0, 2.0, 100.0, 10.0, 30.0, math.nan, 5.0),
    ]  # fmt: skip

    def all_gather(every: list[torch.Tensor], here: torch.Tensor) -> None:
        assert len(here) == len(gathered[0])
        for rank, values in zip(every, gathered, strict=True):
            rank.copy_(torch.tensor(values))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    found = telemetry.Telemetry(run.Run(tmp_path, is_writer=True), ranks_a_node=2).step_metrics("cpu")
    assert (found["slowest_rank"], found["slowest_rank_lag_seconds"]) == (2, 8 - 3.5)
    assert (found["peak_memory_bytes"], found["data_wait_seconds"]) == (300, 2.0)
    assert {key: value for key, value in found.items() if key.startswith("node_")} == {
        "node_0/cpu_percent": 50.0, "node_1/cpu_percent": 10.0, "node_0/memory_percent": 20.0,
        "node_1/memory_percent": 30.0, "node_0/gpu_percent": 70.0, "node_0/gpu_memory_percent": 50.0,
        "node_1/gpu_memory_percent": 5.0,
    }  # fmt: skip
