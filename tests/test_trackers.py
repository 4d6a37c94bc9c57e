"""W&B, TensorBoard and Trackio: one run and one curve over a resumption, and nothing of theirs ends or slows a run."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT, manifest, metrics, run, script
from wandb_server import Server

KEY = "k3y" * 13 + "k"  # forty characters, as the client wants
SHORT = {"WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "3"}
TRAIN = {
    "learning_rate": 3e-3, "max_steps": 4, "max_length": 192, "global_batch_size": 4, "bf16": False,
    "per_device_train_batch_size": 2, "logging_steps": 1, "gradient_checkpointing": False, "eval_strategy": "steps",
    "eval_steps": 2, "save_strategy": "steps", "save_steps": 1, "use_peft": True, "lora_target_modules": "all-linear",
}  # fmt: skip


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    """What metrics.jsonl holds of each step, by the trackers' names."""
    found: dict[int, dict[str, Any]] = {}
    for row in metrics(folder):
        for key, value in row.items():
            if key not in ("step", "rows_checksum"):
                name = key.replace("eval_", "eval/", 1) if key.startswith("eval_") else f"train/{key}"
                found.setdefault(row["step"], {})[name] = value
    return found


def told(history: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The same of what a W&B server was sent. A step that came twice fails."""
    steps = [row["_step"] for row in history.values()]
    assert len(steps) == len({*steps}), steps
    shown = ("train/", "eval/")
    return {row["_step"]: {k: v for k, v in row.items() if k.startswith(shown)} for row in history.values()}


def in_turn(folder: Path, commands: list[Any], **env: str) -> str:
    file = folder / "commands.json"
    file.write_text(json.dumps(commands))
    done = run(sys.executable, ROOT / "tests/in_turn.py", file, **env)
    assert done.code == 0 and json.loads(Path(f"{file}.codes").read_text()) == [0] * 2, done
    return done.out + done.err


def resumed(folder: Path, tiny: Path, learnable: Path, write_recipe: Any, **keys: Any) -> list[Any]:
    """A run of four steps, and the same cut off after its second and given again."""
    recipe = write_recipe(**TRAIN, model_name_or_path=str(tiny), dataset_name=str(learnable),
                          eval_dataset_name=str(learnable), **keys)  # fmt: skip
    train = ["--recipe", recipe, "--output_dir"]
    first, again = folder / "run", folder / "again"
    commands = [[*train, first], {"cut": [first, again, 2]}, [*train, again]]
    return json.loads(json.dumps(commands, default=str))


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, str]:
    """The environment of a person who has never used any of them."""
    return {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_API_KEY": "", "NETRC": "/nowhere"}


def test_one_curve_over_a_resumption(tmp_path, tiny, learnable, write_recipe, clean) -> None:
    """Guards transformers#25032 and wandb#5937 (a second W&B run, steps twice), and the same in the two others.

    Without a key W&B is offline; its own `wandb sync` then reads the newest file back, which holds the whole run.
    """
    keys = {"report_to": ["wandb", "tensorboard", "trackio"], "run_name": "mine", "project": "tests"}
    commands = resumed(tmp_path, tiny, learnable, write_recipe, **keys)
    said = in_turn(tmp_path, commands, **clean)
    again = tmp_path / "again"
    files = sorted(again.glob("wandb/offline-run-*"))
    assert len(files) == 2 and said.count("wandb sync") == 2
    with Server() as server:
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", files[-1]],
            env={**clean, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "PATH": ""}, check=True, timeout=120,
        )  # fmt: skip
    (name,) = server.history
    assert name == manifest(again)["wandb_run_id"]
    assert json.loads((again / "checkpoint-4/COMPLETE.json").read_text())["wandb_run_id"] == name
    assert told(server.history[name]) == rows(again)
    assert server.summary[name]["report"]["_type"] == "html-file"
    assert server.summary[name]["samples"]["_type"] == "html-file"
    asked = manifest(again)["samples"]
    assert len(asked["before"]) == len(asked["after"]) == 3
    pages = [file.read_text() for file in files[-1].glob("files/media/html/samples*.html")]
    assert pages and all(html.escape(row["answer"]) in pages[0] for row in asked["before"] + asked["after"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(again / "tensorboard")).Reload()
    losses = {step: row["train/loss"] for step, row in rows(again).items()}
    # TensorBoard keeps a single precision float
    assert {e.step: e.value for e in board.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert len(board.Scalars("train/loss")) == len(losses)

    read = "import json, trackio.sqlite_storage as s; print(json.dumps([r for n in s.SQLiteStorage.get_runs('tests') "
    read += "for r in s.SQLiteStorage.get_logs('tests', n)], default=str))"
    logged = json.loads(run(sys.executable, "-c", read, **clean).out.splitlines()[-1])
    assert [r["train/loss"] for r in logged if "train/loss" in r] == list(losses.values())


def test_online_a_resumed_run_goes_on(tmp_path, tiny, learnable, write_recipe, clean) -> None:
    """Guards the id, the step and the secret: one run on the server, each step once, and no key in any file."""
    keys = {"report_to": "wandb", "wandb_tags": ["a"], "wandb_log_model": False}
    commands = resumed(tmp_path, tiny, learnable, write_recipe, **keys)
    with Server() as server:
        said = in_turn(tmp_path, commands, **{**clean, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url})
    assert list(server.history) == [manifest(tmp_path / "again")["wandb_run_id"]], said
    (history,) = server.history.values()
    assert {s: r["train/loss"] for s, r in told(history).items()} == {
        s: r["train/loss"] for s, r in rows(tmp_path / "again").items()
    }
    assert KEY not in said
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def test_a_server_that_fails_changes_nothing(tmp_path, tiny, learnable, write_recipe, clean) -> None:
    """Guards a run against W&B: a server that answers 500 is left after the time-out, and said once."""
    recipe = write_recipe(**TRAIN, model_name_or_path=str(tiny), dataset_name=str(learnable),
                          eval_dataset_name=str(learnable), report_to="wandb")  # fmt: skip
    with Server("error") as server:
        env = {**clean, **SHORT, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "run", **env)
    assert done.code == 0 and len(metrics(tmp_path / "run")) == 6, done
    assert done.out.count("its server cannot be used") == 1 and "wandb sync" in done.out


@pytest.mark.parametrize("fault", ["hang", "later"])
def test_a_server_that_hangs_is_not_waited_for(fault, tmp_path, monkeypatch, settings, capsys) -> None:
    """Guards against a silent server: at the start the run goes offline, later it is left at the end."""
    import wandb

    from stepladder.run import Run
    from stepladder.training.trackers import Tracker, Wandb

    record = Run(tmp_path, is_writer=True)
    record.manifest = {"wandb_run_id": "abc", "totals": {"steps": 3}}
    (tmp_path / "metrics.jsonl").write_text("")
    args, state = SimpleNamespace(project="p", run_name=None), SimpleNamespace(global_step=0, is_hyper_param_search=0)
    with Server(fault) as server:
        for name, value in {**SHORT, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()
        tracker = Tracker(Wandb(record, settings()))
        tracker.on_train_begin(args, state, None)
        for state.global_step in (1, 2, 3):
            tracker.on_log(args, state, None, logs={"loss": 1.0})
        tracker.close()
        wandb.teardown()
    assert tracker.callback is not None  # it failed in no event
    said = capsys.readouterr().out
    assert ("its server cannot be used" if fault == "hang" else "did not take everything") in said


def test_a_tracker_that_raises_is_left_out(capsys) -> None:
    """Guards the run against any tracker's error, such as a full disk: said once, and not asked again."""
    from stepladder.training.trackers import Tracker

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    tracker = Tracker(SimpleNamespace(on_log=broken))  # type: ignore[arg-type]
    tracker.on_log(logs={})
    tracker.on_log(logs={})
    assert capsys.readouterr().out.count("No space left on device") == 1
