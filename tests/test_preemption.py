"""A signal to any process of a run stops all its ranks at one step, after a checkpoint, and the run says so."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import Session, difference

from background import PATIENCE, Running, steps_logged
from conftest import ROOT, manifest, metrics, script

pytestmark = [pytest.mark.proof, pytest.mark.alone]


@pytest.fixture
def recipe(tiny, learnable, write_recipe) -> Path:
    """Long enough not to end before a signal comes."""
    return write_recipe(
        model_name_or_path=str(tiny), dataset_name=str(learnable), use_peft=True, lora_target_modules="all-linear",
        max_steps=3000, global_batch_size=2, per_device_train_batch_size=1, learning_rate=1e-3, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="steps", save_steps=1000, max_length=192,
    )  # fmt: skip


def twice_to_all_apart(running: Running) -> None:
    for _ in range(2):
        for pid in running.pids():
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.15)


SIGNALS: dict[str, Callable[[Running], None]] = {
    "one rank": lambda running: os.kill(running.pids()[1], signal.SIGTERM),
    "all ranks, apart, twice": twice_to_all_apart,
    "the launcher": lambda running: os.kill(running.process.pid, signal.SIGTERM),
    "the launcher, which dies of it": lambda running: os.kill(running.process.pid, signal.SIGUSR1),
    "the launcher, whose terminal is closed": lambda running: os.kill(running.process.pid, signal.SIGHUP),
    "the terminal's group": lambda running: os.killpg(running.process.pid, signal.SIGINT),
}


@pytest.mark.parametrize("to", SIGNALS)
def test_all_ranks_stop_at_one_step(to, recipe, tmp_path) -> None:
    """Guards against ranks that stop at different steps and hang (3 of 3 with Transformers' jit checkpoint)."""
    folder = tmp_path / "run"
    running = Running("--recipe", recipe, "--output_dir", folder, ranks=2)
    running.wait_for(lambda: steps_logged(folder) >= 2)
    ranks = running.pids()
    SIGNALS[to](running)
    code, out = running.end()
    assert code != 0, out  # torchrun has its own code: run.json tells
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end, "a rank runs on"
        time.sleep(0.05)
    facts = manifest(folder)
    assert facts["status"] == "preempted", out
    step = facts["totals"]["steps"]
    assert [row["step"] for row in metrics(folder)] == list(range(1, step + 1))
    assert [file.parent.name for file in folder.glob("checkpoint-*/COMPLETE.json")] == [f"checkpoint-{step}"]


def test_a_signal_while_it_starts_and_the_same_command_again(recipe, tmp_path) -> None:
    """Guards a signal before the first step (it is remembered), exit code 75, the way on, and the seconds of both."""
    folder = tmp_path / "run"
    words = ("--recipe", recipe, "--output_dir", folder)
    running = Running(*words)
    running.wait_for((folder / ".lock").is_file)
    os.kill(running.process.pid, signal.SIGUSR1)
    code, out = running.end()
    assert (code, manifest(folder)["status"], manifest(folder)["totals"]["steps"]) == (75, "preempted", 1), out
    first = manifest(folder)
    began = time.monotonic()
    done = script("sft", *words, "--max_steps", 4, "--allow-change", "max_steps")
    seconds = time.monotonic() - began
    assert done.code == 0, done
    facts, spent = manifest(folder), [row["elapsed_seconds"] for row in metrics(folder)]
    assert 0 < spent[0] < first["elapsed_seconds"] < spent[1] < spent[3] < facts["elapsed_seconds"]
    assert 0.5 * seconds < facts["elapsed_seconds"] - first["elapsed_seconds"] < seconds
    assert facts["totals"]["goodput"] == pytest.approx(facts["totals"]["seconds"] / spent[3], rel=0.5)
    assert 0 < facts["totals"]["first_step_after_seconds"] < seconds and "over 2 starts" in done.out
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert manifest(folder)["resumed"][0]["step"] == 1


def test_a_closed_terminal(recipe, tmp_path) -> None:
    """Guards the ssh session that breaks: the run died of SIGHUP, or of what it then printed."""
    folder = tmp_path / "run"
    terminal, end = pty.openpty()
    command = [sys.executable, "scripts/sft.py", "--recipe", str(recipe), "--output_dir", str(folder)]
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup make prove` ignores
    try:
        process = subprocess.Popen(["setsid", "--ctty", *command], cwd=ROOT, stdin=end, stdout=end, stderr=end)
    finally:
        signal.signal(signal.SIGHUP, usual)
    os.close(end)
    stop = time.monotonic() + PATIENCE
    while steps_logged(folder) < 2:
        assert process.poll() is None and time.monotonic() < stop, os.read(terminal, 100_000).decode()
        time.sleep(0.05)
    os.close(terminal)
    assert process.wait(PATIENCE) == 75
    assert manifest(folder)["status"] == "preempted"


def test_nohup_keeps_its_meaning(recipe, tmp_path) -> None:
    """Guards `nohup python scripts/sft.py`: the run trains on after the session has ended."""
    folder = tmp_path / "run"
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        running = Running("--recipe", recipe, "--output_dir", folder)
    finally:
        signal.signal(signal.SIGHUP, usual)
    running.wait_for(lambda: steps_logged(folder) >= 2)
    os.kill(running.process.pid, signal.SIGHUP)
    logged = steps_logged(folder)
    running.wait_for(lambda: steps_logged(folder) >= logged + 5)
    os.kill(running.process.pid, signal.SIGTERM)
    code, out = running.end()
    assert code == 75 and "SIGTERM: the run ends this step" in out and "SIGHUP" not in out, out


STOPS = """
import os, signal
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["STOP_AT"]) and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGTERM)
"""
EVALUATED: dict[str, dict[str, Any]] = {  # by what an evaluation decides: the result, the rate, what is saved
    "steps": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 4},
    "epoch": {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "save_steps": 4},
    "best": {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "eval_on_start": True,
             "metric_for_best_model": "loss"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "ranks", "names"), [("single", 1, list(EVALUATED)), ("fsdp", 2, ["steps"]), ("zero3", 2, ["steps"])]
)
def test_an_evaluation_is_left_and_made_later(config, ranks, names, tiny, learnable, tmp_path) -> None:
    """Guards a stop during a long evaluation, which waited for its end, so that the queue's KILL lost everything; and
    against an evaluation that is missing after it, or counts for nothing. It is stopped three times: the first time,
    when it is made up for, and at the last step."""
    (tmp_path / "stops.py").write_text(STOPS)
    session, step, codes = Session(tmp_path, tiny, learnable), 2, []
    for name in names:
        keys = {**EVALUATED[name], "max_steps": 4, "per_device_eval_batch_size": 2}
        session.train(f"{name}-whole", **keys)
        if keys.get("eval_on_start"):
            session.commands.append({"env": {"STOP_AT": "0"}})
            session.train(name, "--callback", tmp_path / "stops.py", **keys)
        for stop in (step, step, 4):
            session.commands.append({"env": {"STOP_AT": str(stop)}})
            session.train(name, "--callback", tmp_path / "stops.py", **keys)
        session.train(name, **keys)
        codes += [0, *[75] * (4 if keys.get("eval_on_start") else 3), 0]
    done = session.start(config, ranks, codes)
    for name in names:
        whole, left = tmp_path / f"{name}-whole", tmp_path / name
        assert max(difference(whole, left).values()) <= 1e-6, done
        assert [entry["step"] for entry in manifest(left)["resumed"]] == [step, step, 4]
        assert manifest(left)["result_step"] == manifest(whole)["result_step"]


def test_the_second_interrupt_ends_at_once() -> None:
    """Guards Ctrl-C: the first asks, and so do its echoes from the launcher; one some time later does not ask."""
    code = (
        "import os, signal, time; from stepladder.training.guard import signals; signals.install();"
        "send = lambda: os.kill(os.getpid(), signal.SIGINT); send(); send(); assert signals.stop_asked();"
        "time.sleep(signals.ANOTHER_AFTER + 0.1); send(); time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 130
