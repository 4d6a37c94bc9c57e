"""Runs of many steps: what is read of their metrics, drawn, followed and kept in checkpoints stays small and right."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerState

from conftest import ROOT, run, script
from stepladder.reporting import curves, page, runs
from stepladder.reporting.series import Curve, running_means, summarize
from stepladder.run import Run
from stepladder.training.watch import telemetry

sys.path.append(str(ROOT / "benchmarks"))
import long_runs

STEPS = 20_000


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was resumed by a tool that repeats steps, with NaN, infinity, damaged lines and a cut last one."""
    folder = tmp_path_factory.mktemp("long") / "run"
    long_runs.write_run(folder, STEPS)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # Each 1,000 steps there are 1,001 lines: line 7,007 is the evaluation at step 7,000.
    repeated = [line.replace('"loss": ', '"loss": 1') for line in lines[6000:7007]]
    lines[7007:7007] = [*repeated, "not json\n", '{"step": null}\n', "\n", "x" * (3 << 20) + "\n"]
    lines[100] = re.sub(r'"loss": [^,]*', '"loss": NaN', lines[100])
    lines[200] = re.sub(r'"grad_norm": [^,]*', '"grad_norm": Infinity', lines[200])
    lines[300] = re.sub(r'"tokens_per_second": [^,]*', '"tokens_per_second": "fast"', lines[300])
    file.write_text("".join(lines) + '{"step": 99999, "lo')
    return folder


def by_plain_reading(folder: Path, key: str) -> dict[int, float]:
    """A metric by step, read by Python's json alone, one row after the other."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().split("\n"):
        try:
            row = json.loads(line)
            found[int(row["step"])] = float(row[key])
        except (ValueError, KeyError, TypeError):
            continue
    return found


@pytest.mark.parametrize("key", ["loss", "eval_loss", "grad_norm", "tokens_per_second"])
def test_a_long_run_is_read_as_its_lines_say(key: str, long: Path) -> None:
    """Guards the columns: repeated steps, values that are no number, lines that are none, evaluations among them."""
    logged = runs.read(long)
    expected = by_plain_reading(long, key)
    assert len(expected) >= (20 if key == "eval_loss" else STEPS - 1)
    curve = logged.curve(key)
    assert curve.steps.tolist() == sorted(expected)
    np.testing.assert_array_equal(curve.values, [expected[step] for step in sorted(expected)])
    assert logged.last_step == STEPS
    remarks = "\n".join(logged.remarks)
    assert "damaged at line 8015, 8016, 8018: left out" in remarks and "is cut short" in remarks, remarks


def test_its_page_is_small_and_keeps_the_shape(long: Path) -> None:
    """Guards the page: below a megabyte whatever the length, each extreme and both ends in it, and it says so."""
    logged = runs.read(long)
    source = page.render_page([logged])
    assert len(source) < 1 << 20
    assert "2,000 of 20,000 logged steps are drawn" in source
    (drawn,) = json.loads(re.search(r'id="logged">(.*?)</script>', source)[1])
    assert len(drawn["line"]["step"]) == 2000 and (drawn["line"]["step"][0], drawn["line"]["step"][-1]) == (1, STEPS)
    for key in ("loss", "grad_norm", "learning_rate"):
        values = [value for value in by_plain_reading(long, key).values() if math.isfinite(value)]
        for name, extreme in (("low", min(values)), ("high", max(values))):
            shown = [value for value in drawn["line"][f"{key}_{name}"] if value is not None]
            assert (min if name == "low" else max)(shown) == pytest.approx(extreme, rel=1e-6), (key, name)
    assert len(drawn["points"]["step"]) == 20 and "eval_loss_low" not in drawn["points"]


@pytest.mark.parametrize("steps", [100, 5999])
def test_a_shorter_run_is_drawn_step_by_step(steps: int, tmp_path: Path) -> None:
    """Guards the page of an ordinary run: every logged value is in it."""
    long_runs.write_run(tmp_path / "run", steps)
    source = page.render_page([runs.read(tmp_path / "run")])
    (drawn,) = json.loads(re.search(r'id="logged">(.*?)</script>', source)[1])
    losses = by_plain_reading(tmp_path / "run", "loss")
    assert dict(zip(drawn["line"]["step"], drawn["line"]["loss"], strict=True)) == pytest.approx(losses, rel=1e-6)
    assert set(drawn["line"]) == {"step", *(line for _, line, *_ in page.CHARTS)} and "logged steps are" not in source


def test_many_runs_share_the_page(tmp_path: Path) -> None:
    """Guards the size of a comparison of many long runs."""
    for number in range(8):
        long_runs.write_run(tmp_path / f"run{number}", 3000, seed=number)
    assert len(page.render_page(runs.read_all(sorted(tmp_path.iterdir())))) < 1 << 20


@pytest.mark.parametrize("seed", range(30))
def test_stretches_keep_extremes_means_and_ends(seed: int) -> None:
    """Guards the thinning, against a slow one: every value is in one stretch, and its three figures are theirs."""
    drawn = random.Random(seed)
    count, most = drawn.randrange(1, 300), drawn.randrange(3, 60)
    steps = sorted(drawn.sample(range(1000), count))
    # Where each value is its own place, the lowest and the highest are the stretch's ends.
    places = summarize(Curve(steps, range(count)), most)
    ends = list(zip(places.lows.astype(int), places.highs.astype(int), strict=True))
    assert len(ends) == min(count, most)
    assert [low for low, _ in ends] == [0, *(high + 1 for _, high in ends[:-1])] and ends[-1][1] == count - 1
    sizes = {high - low + 1 for low, high in ends[1:-1]}
    assert (
        ends[0] == (0, 0) and ends[-1] == (count - 1, count - 1) and max(sizes, default=1) - min(sizes, default=1) < 2
    )

    odd = (math.nan, math.inf, -math.inf, 1e90, -5.0)
    values = [drawn.choice(odd) if drawn.random() < 0.2 else drawn.gauss(2, 1) for _ in steps]
    found = summarize(Curve(steps, values), most)
    for (low, high), step, *figures in zip(ends, found.steps, found.means, found.lows, found.highs, strict=True):
        good = [value for value in values[low : high + 1] if math.isfinite(value)]
        assert step == steps[(low + high) // 2]
        right = (statistics.fmean(good), min(good), max(good)) if good else (math.nan,) * 3
        np.testing.assert_allclose(figures, right, rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "half"), [(1, 0), (1, 5), (2, 1), (7, 1), (100, 5), (101, 50), (64, 100), (1000, 49), (1000, 50)]
)
def test_running_means_are_those_of_a_slow_loop(count: int, half: int) -> None:
    """Guards the verdicts' smoothed curve, with one value that would erase all others from a running sum."""
    values = np.random.default_rng(count).normal(2, 1, count)
    values[count // 3] = 1e90
    slow = [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(count)]
    np.testing.assert_allclose(running_means(values, half), slow, rtol=1e-13)


def test_a_million_steps_are_judged() -> None:
    """Guards linear work: a window of a tenth of the run, summed anew for each step, would be 10¹¹ additions."""
    steps = np.arange(1, 1_000_001)
    noise = np.random.default_rng(0).normal(0, 0.05, len(steps))
    loss, norm = 1.5 + 2 * np.exp(-steps / 150_000) + noise, np.ones(len(steps))
    found = curves.judge_curves(Curve(steps, loss), Curve(steps, loss - noise + 0.1), Curve(steps, norm))
    assert {verdict.name for verdict in found} == {"converged", "generalizes"}, found
    (converged,) = (verdict for verdict in found if verdict.name == "converged")
    # As in test_the_phases_lie_where_the_curve_turns, with a pace of 150,000 steps.
    assert abs(converged.figures["knee"] - 150_000 * math.log(1000 / 150)) < 100_000, converged
    json.dumps([vars(verdict) for verdict in found])


def test_curves_of_the_same_run_do_not_differ(long: Path) -> None:
    """Guards the comparison of runs: over the common steps, whichever are missing."""
    first, second = runs.read(long), runs.read(long)
    assert curves.between(first, second).loss == math.inf  # both have a NaN
    for logged in (first, second):
        logged.curves["loss"] = logged.curve("loss").finite()
    second.curves["loss"] = Curve(second.curve("loss").steps[::3], second.curve("loss").values[::3] + 0.5)
    found = curves.between(first, second)
    assert found.steps == len(second.curve("loss")) and found.eval_loss == 0
    assert (found.loss, found.loss_residual) == pytest.approx((0.5, 0.5))


def test_commands_take_little_memory(tmp_path: Path) -> None:
    """Guards every reader of metrics.jsonl: a hundred thousand lines (48 MiB) take a few MiB more than a thousand.

    Kept as rows they take 200 MiB and more.
    """
    done = run(sys.executable, "benchmarks/long_runs.py", "--steps", 1000, 100_000)
    assert done.code == 0, done
    short, long = ([int(n) for n in re.findall(r"s, (\d+) MiB", line)] for line in done.out.splitlines()[2:4])
    assert len(short) == len(long) == 5, done
    assert all(after - before < 32 for before, after in zip(short, long, strict=True)), done


def test_watch_shows_the_end_of_a_long_run(long: Path) -> None:
    """Guards --watch: what was logged before is not printed line by line, and new lines are numbered in the file."""
    done = script("report", long, "--watch")
    shown = done.out.splitlines()
    left_out = int(shown[0].split()[-1].replace(",", ""))
    lines = (long / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert sum(map(len, lines[left_out:])) <= runs.FOLLOWED_BYTES < sum(map(len, lines[left_out - 1 :]))
    assert "earlier lines of metrics.jsonl are left out: " in shown[0] and shown[-1] == "the run is finished"
    assert [int(line.split()[1]) for line in shown[1:-1]] == [json.loads(line)["step"] for line in lines[left_out:-1]]


def test_a_resumed_run_rewinds_a_long_file(long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the rewinding, line by line: the rows up to the checkpoint's step stay as they are, byte by byte."""
    content = (long / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(content)
    record = Run(tmp_path, is_writer=True)
    record._rewind(500)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(content.splitlines(keepends=True)[:500])
    assert record.logged_until == STEPS and "has 4 damaged lines" in capsys.readouterr().out


def test_a_resumed_run_adds_the_seconds_before(tmp_path: Path) -> None:
    """Guards `elapsed_seconds` where only the end of a long file is read for it."""
    long_runs.write_run(tmp_path / "run", STEPS)
    record = Run(tmp_path / "run", is_writer=True)
    record.manifest = json.loads((tmp_path / "run/run.json").read_text())
    record.manifest["datasets"] = [{"sha256": ""}]
    record.begin("", {"step": 500, "from": ""}, **record.manifest)
    assert max(by_plain_reading(tmp_path / "run", "step")) == 500 and 0 < record.elapsed - 0.6 * STEPS < 3600


@pytest.mark.parametrize("seed", range(8))
def test_the_history_in_checkpoints_is_short(seed: int, tmp_path: Path) -> None:
    """Guards trainer_state.json: however many steps are logged it stays small, and the result's losses are the same."""
    drawn = random.Random(seed)
    state, whole = TrainerState(), TrainerState()
    state.log_history, meter = [], telemetry.Telemetry(SimpleNamespace(log=lambda row: None))  # type: ignore[arg-type]
    logging, evaluating = drawn.choice((1, 7, 400)), drawn.choice((1, 5, 300))
    for step in range(2000):
        state.global_step = whole.global_step = step
        for due, key in ((step and step % logging == 0, "loss"), (step % evaluating == 0, "eval_loss")):
            if due:
                entry = {key: drawn.random(), "step": step}
                state.log_history.append(entry)
                whole.log_history.append(entry)
                meter.on_log(None, state, None, dict(entry))
        if step % evaluating == 0 and (drawn.random() < 0.02 or not step):
            state.best_global_step = whole.best_global_step = step
        for best in ("", "a checkpoint") if step % 37 == 0 else ():
            state.best_model_checkpoint = whole.best_model_checkpoint = best
            assert telemetry.final_losses(state) == telemetry.final_losses(whole), step
        assert len(state.log_history) <= 2 * telemetry.HISTORY


def test_timed_passes_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards memory on a GPU where steps are logged rarely or never: two CUDA events per micro-batch."""

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = 0

        def record(self) -> None:
            self.at = next(clock)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> int:
            return 1000 * (end.at - self.at)

    clock = itertools.count()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = telemetry.Telemetry(Run(tmp_path, is_writer=True))
    for _ in range(5000):
        with meter.forward(torch.device("cuda")):
            assert len(meter._events) <= 2 * telemetry.PASSES
    ((_, forward, *_),) = zip(*meter._gather("cpu"), strict=True)
    assert forward == 5000 and not meter._events


def test_without_logging_nothing_gathers(tiny: Path, learnable: Path, tmp_path: Path) -> None:
    """Guards memory and checkpoints under `logging_strategy: no`: TRL keeps its metrics until a log, and none comes."""
    done = script(
        "sft", "--recipe", "lora", "--model_name_or_path", tiny, "--dataset_name", learnable, "--eval_strategy", "no",
        "--eval_dataset_name", "null", "--max_steps", 3, "--save_strategy", "steps", "--save_steps", 3,
        "--logging_strategy", "no", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done
    (state,) = (tmp_path / "run").glob("checkpoint-3/state.json")
    assert json.loads(state.read_text())["since_log"]["metrics"] == {}
