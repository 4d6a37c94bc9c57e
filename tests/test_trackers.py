"""W&B, TensorBoard and Trackio: one run and one curve over a resumption, and nothing of theirs ends or slows a run."""

from __future__ import annotations

import html
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT, launch, manifest, metrics, run, script
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


def digest(folder: Path) -> str:
    """W&B's own, of an artifact that holds a run's result and facts: another byte or name is another digest."""
    import wandb

    artifact = wandb.Artifact("result", type="model")
    for name in ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer.json",
                 "tokenizer_config.json", "generation_config.json", "README.md", "recipe.yaml", "run.json",
                 "audit.json", "held_out.json", "held_out_losses.json"):  # fmt: skip
        if (folder / name).is_file():
            artifact.add_file(str(folder / name))
    return str(artifact.digest)


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
    keys = {"report_to": ["wandb", "tensorboard", "trackio"], "run_name": "mine", "project": "tests",
            "wandb_entity": "us", "wandb_run_group": "group", "wandb_tags": ["a", "b"],
            "wandb_log_model": True}  # fmt: skip
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
    sent, facts = server.asked["UpsertBucket"][0], manifest(again)
    asked_for = {"entity": "us", "project": "tests", "groupName": "group", "displayName": "mine", "tags": ["a", "b"]}
    assert asked_for.items() <= sent.items()
    config = {key: entry["value"] for key, entry in json.loads(sent["config"]).items()}
    for key in ("recipe", "strategy", "world_size", "packages", "parameters"):
        assert config[key] == facts[key]
    (artifact,) = (asked["input"] for asked in server.asked["CreateArtifact"])
    assert (artifact["artifactCollectionName"], artifact["artifactTypeName"]) == (f"model-{name}", "model")
    assert artifact["digest"] == digest(again)
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


ENDS = {
    "preempted": ("os.kill(os.getpid(), signal.SIGTERM)", 75),
    "failed": ("raise RuntimeError('mine')", 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_one_run_over_a_stop_and_a_failure(end, tmp_path, tiny, learnable, write_recipe, clean) -> None:
    """Guards the end of a start that is not the run's: W&B is told how it ended, and goes on in the same run.

    The one that failed never reached a checkpoint and starts anew. Damaged metrics are left out, and no password
    of an address, key or token is in any file or output.
    """
    what, code = ENDS[end]
    mine, folder = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text(
        "import os, signal\nfrom transformers import TrainerCallback\nclass Callback(TrainerCallback):\n"
        f"  def on_step_end(self, args, state, control, **kwargs):\n    if state.global_step == 2: {what}\n"
    )
    recipe = write_recipe(**TRAIN | {"save_steps": 10}, model_name_or_path=str(tiny), dataset_name=str(learnable),
                          eval_dataset_name=str(learnable), report_to="wandb")  # fmt: skip
    words = ["--recipe", recipe, "--output_dir", folder]
    with Server() as server:
        url = server.url.replace("//", "//us:s3cret@")
        env = {**clean, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "HF_TOKEN": "hf_t0ken"}
        env["WANDB_FINISH_TIMEOUT"] = "120"  # what is late on a busy machine is not what is asked here
        first = script("sft", *words, "--callback", mine, **env)
        assert (first.code, manifest(folder)["status"]) == (code, end), first
        name = manifest(folder)["wandb_run_id"]
        with (folder / "metrics.jsonl").open("a") as out:
            out.write('5\n[]\n{}\n{"step": null}\n{"step":"3"}\n{"step": 99, "lo')
        again = script("sft", *words, **env)
    assert again.code == 0 and again.out.count("metrics.jsonl has 5 damaged lines: left out") == 1, again
    assert [name] == [*server.history] == [manifest(folder)["wandb_run_id"]]
    assert sorted({row["_step"] for row in server.history[name].values()}) == sorted(rows(folder)) == [1, 2, 3, 4]
    steps = [row["_step"] for row in server.history[name].values() if "train/loss" in row]
    assert len(steps) == len({*steps})
    assert (server.exits, server.preempted) == ([code, 0], end == "preempted"), again
    said = first.out + first.err + again.out + again.err
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not [secret for secret in (KEY, "s3cret", "hf_t0ken") if secret in said or
                any(secret.encode() in content for content in files)]  # fmt: skip


@pytest.mark.parametrize("fault", ["error", "refused"])
def test_a_server_that_fails_changes_nothing(fault, tmp_path, tiny, learnable, write_recipe, clean) -> None:
    """Guards a run against its trackers: a W&B server that answers 500, or none, is left after the time-out, and a
    folder that TensorBoard cannot write is too; each is said once."""
    recipe = write_recipe(**TRAIN, model_name_or_path=str(tiny), dataset_name=str(learnable),
                          eval_dataset_name=str(learnable), report_to=["wandb", "tensorboard"])  # fmt: skip
    with Server("error") as server:
        url = server.url if fault == "error" else "http://127.0.0.1:1"
        env = {**clean, **SHORT, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "TENSORBOARD_LOGGING_DIR": "/proc/tb"}
        done = script("sft", "--recipe", recipe, "--output_dir", tmp_path / "run", **env)
    assert done.code == 0 and len(metrics(tmp_path / "run")) == 6, done
    assert done.out.count("its server cannot be used") == 1 and "wandb sync" in done.out
    assert done.out.count("tensorboard fails and is left out") == 1


def test_rank_0_alone_speaks(tmp_path, tiny, learnable, write_recipe, clean) -> None:
    """Guards a log of two ranks: each step's line once and plain, quiet libraries, one W&B run."""
    recipe = write_recipe(**TRAIN, model_name_or_path=str(tiny), dataset_name=str(learnable),
                          eval_dataset_name=str(learnable), report_to="wandb")  # fmt: skip
    done = launch("ddp", 2, "sft", "--recipe", recipe, "--output_dir", tmp_path / "run", **clean)
    assert done.code == 0 and len([*tmp_path.glob("run/wandb/offline-run-*")]) == 1, done
    assert re.findall(r"^  step +(\d/4) ", done.out, re.MULTILINE) == ["1/4", "2/4", "3/4", "4/4"]
    assert not {"\r", "\x1b"} & {*done.out} and not done.err.strip(), done


def test_what_wandb_goes_without_is_said(tmp_path, monkeypatch, settings, capsys) -> None:
    """Guards the rest against questions that fail, or that no rank can ask, and WANDB_MODE=disabled against "None".

    The artifact is waited for longer than the curves.
    """
    from stepladder.run import Run
    from stepladder.training.watch.trackers import Tracker, Wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    record = Run(tmp_path, is_writer=True)
    record.manifest = {"wandb_run_id": "abc", "strategy": "zero3"}
    (tmp_path / "metrics.jsonl").write_text("")
    args = SimpleNamespace(project="p", run_name=None)
    state = SimpleNamespace(global_step=0, max_steps=0, is_hyper_param_search=False)
    tracker = Tracker(Wandb(record, settings(wandb_log_model=True, eval_dataset_name="rows.jsonl")))
    tracker.on_train_begin(args, state, None)
    assert "under zero3 no rank has the whole model" in (said := capsys.readouterr().out)
    assert said.count("since WANDB_MODE is disabled") == 1 and "None" not in said
    tracker.callback.ask = lambda model: 1 / 0
    tracker.on_train_begin(args, state, None)
    tracker.on_train_end(args, state, None)
    assert capsys.readouterr().out.count("sample questions fail") == 1 and tracker.callback is not None
    own, waited = tracker.callback, []
    assert isinstance(own, Wandb)
    tracker.close(1)

    logged, record.manifest["totals"] = SimpleNamespace(wait=waited.append), {}
    settings_of_run = SimpleNamespace(mode="online", finish_timeout=30.0)
    own.run = SimpleNamespace(id="abc", summary={}, settings=settings_of_run, log_artifact=lambda artifact: logged)
    own._add_results()
    assert waited == [600]


@pytest.mark.parametrize(("host", "found"), [("api.wandb.ai", False), ("wandb.ours", True)])
def test_the_key_of_the_server_that_is_used(host, found, tmp_path, monkeypatch, settings) -> None:
    """Guards `check`: a key in the file of NETRC counts for WANDB_BASE_URL's host, and for no other."""
    from stepladder import requirements

    (tmp_path / "keys").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    env = {"WANDB_API_KEY": "", "WANDB_BASE_URL": "https://wandb.ours:8080", "NETRC": str(tmp_path / "keys")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    said = requirements.accounts(settings(report_to="wandb"))
    assert said.startswith("W&B with its key" if found else "W&B offline")


@pytest.mark.parametrize("fault", ["hang", "later"])
def test_a_server_that_hangs_is_not_waited_for(fault, tmp_path, monkeypatch, settings, capsys) -> None:
    """Guards against a silent server: at the start the run goes offline, later it is left at the end."""
    import wandb

    from stepladder.run import Run
    from stepladder.training.watch.trackers import Tracker, Wandb

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
        callback = tracker.callback
        tracker.close(0)
        wandb.teardown()
    assert callback is not None  # it failed in no event
    said = capsys.readouterr().out
    assert "left out" not in said
    assert ("its server cannot be used" if fault == "hang" else "did not take everything") in said


def test_offline_a_full_disk_is_noticed(tmp_path, monkeypatch, settings, capsys, clean) -> None:
    """Guards a disk that is full for a while: W&B's service stops writing for good, and says nothing. The file that is
    made in its place holds the whole run, by W&B's own `sync`."""
    import psutil
    import wandb

    from stepladder.run import Run
    from stepladder.training.watch.trackers import Tracker, Wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    record = Run(tmp_path, is_writer=True)
    record.manifest = {"wandb_run_id": "abc", "status": "finished", "totals": {"steps": 9}}
    args, state = SimpleNamespace(project="p", run_name=None), SimpleNamespace(global_step=0, is_hyper_param_search=0)
    tracker = Tracker(Wandb(record, settings()))
    (tmp_path / "metrics.jsonl").write_text("")
    tracker.on_train_begin(args, state, None)
    (service,) = (p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core")
    for state.global_step in range(1, 10):
        record.log({"step": state.global_step, "loss": 1.0})
        tracker.on_log(args, state, None, logs={"loss": 1.0})
        if state.global_step == 3:
            resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    is_whole = Wandb._is_whole

    def with_room_again(self) -> bool:
        """The first look, which waits for the service's late writes, is under the limit; then there is room again."""
        found = is_whole(self)
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return found

    monkeypatch.setattr(Wandb, "_is_whole", with_room_again)
    tracker.close(0)
    wandb.teardown()
    said = capsys.readouterr().out
    assert "lacks the run's end" in said and said.count("wandb sync") == 2, said
    newest = max(tmp_path.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime)
    with Server() as server:
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", newest],
            env={**clean, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "PATH": ""}, check=True, timeout=120,
        )  # fmt: skip
    assert [row["_step"] for row in server.history["abc"].values()] == list(range(1, 10))
    assert server.summary["abc"]["totals/steps"] == 9


def test_a_tracker_that_raises_is_left_out(capsys) -> None:
    """Guards the run against any tracker's error, such as a full disk: said once, and not asked again."""
    from stepladder.training.watch.trackers import Tracker

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    tracker = Tracker(SimpleNamespace(on_log=broken))  # type: ignore[arg-type]
    tracker.on_log(logs={})
    tracker.on_log(logs={})
    assert capsys.readouterr().out.count("No space left on device") == 1
