"""The quarter of an hour on a GPU, before there is one: what is recorded, in which order, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))
import gpu_day

GPU_DAY = (sys.executable, "benchmarks/gpu_day.py")


def a_day(folder: Path, ends: dict[str, tuple[int | None, dict]], left: float = 1e6, record: Any = None) -> dict:
    """A call whose steps end as told, with exit code and result, in the order in which they are started."""
    day = gpu_day.Day(gpu_day.Place(folder, gpu=True), folder, time.monotonic() + left, {}, record or {"steps": {}})
    day.todo = [gpu_day.Step(name, 60, lambda place: {}, ()) for name in ends]
    started: list[str] = []

    def start(step: gpu_day.Step, limit: float) -> tuple[int | None, str]:
        # what a SIGKILL at this moment would leave
        assert json.loads((folder / "record.json").read_text())["steps"][step.name]["outcome"] == gpu_day.CUT
        started.append(step.name)
        code, result = ends[step.name]
        day.log(step).write_text("\n".join(map(str, range(90))) + "\nthe cause\n")
        day.log(step).with_suffix(".json").write_text(json.dumps(result))
        return code, ""

    day.started = start  # type: ignore[method-assign]
    with contextlib.ExitStack() as stack:
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, sign, signal.getsignal(sign))
        day.run()
    return {**json.loads((folder / "record.json").read_text()), "started": started}


def test_a_failure_ends_no_other_step_and_is_tried_last(tmp_path: Path) -> None:
    """Guards the hour: one broken recipe must cost its own step only, and what failed must not be tried before what was
    never tried; a fault in a result is a failure, and no time for a second try does not cover the first one's end."""
    ends: dict = {"smoke a": (1, {}), "smoke b": (0, {"figures": {"loss": 1.5}}), "curve c": (0, {"fault": "it parts"})}
    found = a_day(tmp_path, ends)
    outcomes = {name: entry["outcome"] for name, entry in found["steps"].items()}
    assert outcomes == {"smoke a": "failed", "smoke b": "done", "curve c": "failed"}
    assert found["steps"]["smoke a"]["output"][-1] == "the cause" and len(found["steps"]["smoke a"]["output"]) == 25
    page = (tmp_path / "page.md").read_text()
    assert "the cause" in page and "loss 1.5" in page and "curve c: failed: it parts" in page
    again = a_day(tmp_path, {**ends, "plan d": (0, {}), "curve c": (0, {})}, record={"steps": dict(found["steps"])})
    assert again["started"] == ["plan d", "smoke a", "curve c"]
    late = a_day(tmp_path, {**ends, "plan d": (0, {})}, left=10, record={"steps": dict(found["steps"])})
    assert (
        not late["started"] and late["steps"]["smoke a"]["output"] and late["steps"]["plan d"]["outcome"] == "no time"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no CUDA GPU is here"),
        (("--rehearse", "--minutes", "nan"), "--minutes: nan is not a finite number"),
        (("--rehearse", "--out", ""), "--out: it is empty"),
        (("--rehearse", "--out", "/proc"), "/proc cannot be written to"),
        (("--rehearse", "--step", "smoke nothing"), "there is no step 'smoke nothing'"),
    ],
)
def test_what_cannot_begin_says_why(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Guards against an hour begun on a machine without a GPU: exit code 2, and no record."""
    done = run(*GPU_DAY, *words, "--folder", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done
    assert not (tmp_path / "record.json").exists()


def test_a_record_of_something_else_is_not_gone_on_with(tmp_path: Path, smollm2: Path) -> None:
    """Guards against figures of two machines on one page, and against a traceback at a file that is no record."""
    step = '{"facts": {}, "steps": {"smoke full": {"outcome": %s}}}'
    for text, said in (
        ('{"steps": {"smoke full": 3}}', "is no record of a call"),
        (step % '"done", "why": ""', "is no record of a call: 'seconds'"),
        (step % '"done", "why": "", "seconds": 1, "lines": 4', "is no record of a call"),
        (step % '"over", "why": ""', "is no record of a call: the outcome of 'smoke full'"),
        ('{"facts": {"device": "NVIDIA H200", "torch": "2.11.0"}, "steps": {}}', "begun on NVIDIA H200, 2.11.0"),
    ):
        (tmp_path / "record.json").write_text(text)
        done = run(*GPU_DAY, "--rehearse", "--folder", tmp_path)
        assert done.code == 2 and said in done.err, done
        assert (tmp_path / "record.json").read_text() == text


@pytest.mark.proof
def test_a_rehearsal_that_is_killed_goes_on(tmp_path: Path, smollm2: Path) -> None:
    """Guards the whole of it, by the scripts that a GPU would run: killed in its second step it leaves a record with
    the first, its children are ended by the next call, and that ends with every step done or skipped by name."""
    words = [*GPU_DAY, "--rehearse", "--folder", str(tmp_path), "--minutes", "40"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        file = tmp_path / "record.json"
        while not (file.exists() and "smoke lora" in file.read_text()):
            assert first.poll() is None
            time.sleep(0.1)
        first.kill()
    before = json.loads(file.read_text())["steps"]
    assert {name: entry["outcome"] for name, entry in before.items()} == {"smoke full": "done", "smoke lora": "cut off"}
    orphans = [process for process in Path("/proc").glob("[0-9]*") if str(tmp_path) in environ(process)]
    done = run(*words, timeout=1800)
    assert done.code == 0, done
    assert orphans and not any(str(tmp_path) in environ(process) for process in orphans)
    steps = json.loads(file.read_text())["steps"]
    assert steps["smoke full"] == before["smoke full"]
    left = {name: entry["why"] for name, entry in steps.items() if entry["outcome"] != "done"}
    assert all("not installed" in why or why == "needs a GPU" for why in left.values()), left
    page = (tmp_path / "page.md").read_text()
    assert "| tiny, lora, 2 × 64 | `trl sft` |" in page and "| tiny | lora | 2 × 64 |" in page


def environ(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "environ").read_text(errors="replace")
    return ""
