"""What a person sees of a run: in the terminal, by --watch, by a profile, and by a callback of their own."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT, manifest, metrics, script
from stepladder import hardware, run
from stepladder.reporting import watch
from stepladder.training import telemetry
from stepladder.training.utilization import Work


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny, learnable) -> tuple[Path, str]:
    """A run on a pseudo-terminal, with a profile and the callback of the docs; and what it showed."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    recipe = folder.with_name("recipe.yaml")
    keys = {"model_name_or_path": str(tiny), "dataset_name": str(learnable), "eval_dataset_name": str(learnable),
            "max_steps": 6, "max_length": 192, "global_batch_size": 4, "per_device_train_batch_size": 3,
            "bf16": False, "logging_steps": 1, "use_peft": True, "lora_target_modules": "all-linear",
            "eval_strategy": "epoch", "save_strategy": "no", "gradient_checkpointing": True}  # fmt: skip
    recipe.write_text(json.dumps(keys))
    ours, theirs = pty.openpty()
    words = ["scripts/sft.py", "--recipe", recipe, "--output_dir", folder, "--profile", "--callback"]
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "docs/prometheus.py"],
        cwd=ROOT, stdout=theirs, stderr=subprocess.STDOUT, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux' way to say that the other side is closed
        pass
    assert process.wait(60) == 0, shown.decode()
    return folder, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_the_line_on_a_terminal(watched) -> None:
    """Guards the figures of the line, and the three commands that come next."""
    _, shown = watched
    assert re.search(r"6/6 .*loss \d\.\d{4}[↓↑ ] lr \S+  [\d,]+ tok/s  \d\.\d GiB  0:00 left", shown)
    for command in ("generate.py", "compare.py", "merge.py"):
        assert f"python scripts/{command}" in shown


def test_a_profile_names_the_largest_costs(watched) -> None:
    folder, shown = watched
    assert len(re.findall(r"\d\.\d %  [\d,.]+ ms in [\d,]+ calls of ", shown)) == 5
    assert json.loads((folder / "profile.json").read_text())["traceEvents"]


def test_a_callback_of_ones_own(watched) -> None:
    """Guards the seam, by the example of the docs: its metric is in metrics.jsonl, and Prometheus' file is whole."""
    folder, _ = watched
    assert all("tokens_a_step" in row for row in metrics(folder) if "loss" in row)
    lines = (folder / "metrics.prom").read_text().splitlines()
    assert "stepladder_step 6" in lines and all(re.fullmatch(r"stepladder_\w+ \S+", line) for line in lines)


def test_the_figures_agree(watched) -> None:
    """Guards the definitions: counts add up, empty places are padding, and recomputing counts in HFU alone."""
    folder, _ = watched
    rows, totals = [row for row in metrics(folder) if "loss" in row], manifest(folder)["totals"]
    assert rows[-1]["tokens"] == totals["tokens"] and rows[-1]["trained_tokens"] == totals["trained_tokens"]
    assert 0 < totals["trained_tokens"] < totals["tokens"]
    # 4 rows of about one length in 6 places, of which the empty ones hold one pad token beside longer rows
    assert 0.2 < totals["padding"] < 0.5
    assert 0 < totals["mfu"] < totals["hfu"] < 1
    assert totals["seconds"] == pytest.approx(sum(row["step_seconds"] for row in rows), rel=0.01)  # each is rounded


def test_operations_by_the_formula() -> None:
    """Guards 6 N for full fine-tuning and 4 N for frozen weights, and the second forward pass in HFU alone."""
    full = Work(parameters=100, trainable=100, pair=0, recomputes=True, peak=1.0, peak_source="")
    assert full.shares(tokens=10, pairs=0, seconds=1.0) == (6000, 8000)
    lora = Work(parameters=100, trainable=0, pair=5, recomputes=False, peak=1.0, peak_source="")
    assert lora.shares(tokens=10, pairs=3, seconds=1.0) == (4000 + 3 * 5 * 3,) * 2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA L4", 121),
     ("NVIDIA L40S", 362), ("NVIDIA A100-SXM4-80GB", 312), ("Tesla T4", 65), ("NVIDIA A10G", 70)],
)  # fmt: skip
def test_a_gpu_by_its_drivers_name(name, tflops) -> None:
    """Guards against a variant that takes the row of a name that it begins with."""
    row = hardware.gpu(name)
    assert (row and row.tflops) == tflops


def test_follow_a_run_that_is_written(tmp_path, monkeypatch) -> None:
    """Guards a line that is half written, one that is damaged, and a file that a resumption rewinds."""
    monkeypatch.setattr(watch, "POLL", 0.01)
    file, lines = tmp_path / "metrics.jsonl", watch.follow(tmp_path)
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
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    assert [line.split()[-1] for line in lines] == ["1.0000", "finished"]


@pytest.mark.parametrize("content", [None, "x = 1"])
def test_a_callback_that_is_none(content, tmp_path, tiny, learnable) -> None:
    """Guards a wrong --callback: one message, no traceback."""
    from stepladder.errors import LaunchError
    from stepladder.training import callback

    file = tmp_path / "mine.py"
    if content:
        file.write_text(content)
    with pytest.raises(LaunchError, match="--callback"):
        callback.of(str(file))


def test_watch_by_the_command_line(watched) -> None:
    done = script("report", watched[0], "--watch")
    assert done.code == 0 and done.out.count("  loss ") == 6 and done.out.endswith("the run is finished\n"), done


def test_a_folder_that_cannot_be_written_is_named_before_the_run(tmp_path: Path) -> None:
    """Guards the claim of the run folder: a file where a folder should be, and a place that takes none."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/run", Path("/proc/run")):
        done = script("sft", "--recipe", "lora", "--output_dir", place)
        assert done.code == 2 and f"{place} cannot be written" in done.err and "Traceback" not in done.err, done


def test_a_clock_that_jumps_changes_no_figure(tmp_path: Path, monkeypatch) -> None:
    """Guards the monotonic clock: with the machine's time set an hour back and forth, steps take what they take."""
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 + 3600 * (-1) ** next(jumps))
    meter = telemetry.Telemetry(run.Run(tmp_path / "run", is_writer=True))
    for _ in range(4):
        assert [*meter.batches(iter(["batch"]))] == ["batch"]
        time.sleep(0.002)
        meter.count(1, tokens=10, trained=5, places=16, pairs=50)
        meter.on_step_end(None, None, None)
    found = meter.figures("cpu")
    assert all(0 <= seconds < 60 for seconds in meter.step_seconds) and 0 < found["step_seconds"] < 60
    assert found["tokens"] == 40 and found["padding"] == 1 - 40 / 64 and found["tokens_per_second"] > 0
