"""W&B, TensorBoard, Trackio and the others of `report_to`: one run and one curve, however often it is resumed.

None of them may end or slow a run: an error of one is reported once, and it is disabled. Rank 0 alone reports to
them, and the same metrics as in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import itertools
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
    rewrite_logs,
)

from stepladder.console import say
from stepladder.errors import EXIT_FAILED, EXIT_PREEMPTED
from stepladder.recipe.recipe import Recipe
from stepladder.run import Run
from stepladder.training.launch.launcher import Strategy
from stepladder.training.watch.telemetry import DROPPED

Ask = Callable[[Any], list[dict[str, str]]]  # model → each question, its reference and its answer
PATIENCE = "30"  # seconds that a start, and an end, waits for W&B's server, unless W&B's own variables set others
MODEL_PATIENCE = 600  # seconds, or WANDB_FINISH_TIMEOUT where that is more, that the upload of the result may take
WRITING = 10  # seconds that its service may take to write its file on a machine under load
BLOCK = 1 << 15  # bytes, of W&B's file (LevelDB's log format)
NOT_CONFIGURATION = {"status", "progress", "resumed", "started", "ended", "totals", "final", "result_step", "saved",
                     "error", "samples", "stopped_early"}  # fmt: skip
NOT_SHOWN = (DROPPED - {"epoch"}) | {"step", "rows_checksum"}


class Tracker(TrainerCallback):
    """Passes the events that trackers use to one of them, until it fails."""

    def __init__(self, callback: TrainerCallback):
        self.callback: TrainerCallback | None = callback

    def _notify(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.callback is None:
            return
        try:
            getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:
            _warn_left_out(type(self.callback).__name__.removesuffix("Callback"), error)
            self.callback = None

    on_train_begin = functools.partialmethod(_notify, "on_train_begin")
    on_log = functools.partialmethod(_notify, "on_log")
    on_save = functools.partialmethod(_notify, "on_save")
    on_train_end = functools.partialmethod(_notify, "on_train_end")

    def close(self, code: int) -> None:
        """Close it with the run's exit code: with 0 the run is complete and its page written."""
        if hasattr(self.callback, "close"):
            self._notify("close", code)
        self.callback = None


@contextlib.contextmanager
def close_at_end(record: Run) -> Iterator[list[Tracker]]:
    """A list of trackers that are closed at the end of the block, by the status of the run in run.json."""
    trackers: list[Tracker] = []
    try:
        yield trackers
    finally:
        close(trackers, {"finished": 0, "preempted": EXIT_PREEMPTED}.get(record.manifest["status"], EXIT_FAILED))


def close(trackers: list[Tracker], code: int) -> None:
    for tracker in trackers:
        tracker.close(code)


def _warn_left_out(name: str, error: Exception) -> None:
    say(f"⚠ {name} fails and is left out: {brief(error)}; the run goes on, and metrics.jsonl holds everything")


def create_trackers(record: Run, recipe: Recipe, args: Any, ask: Ask | None = None) -> list[Tracker]:
    """The trackers that `report_to` names, on rank 0 alone. Clears `args.report_to`, so that Transformers adds none.

    Args:
        ask: asks the model a few questions, for W&B's table of answers before and after the training.
    """
    names, args.report_to = args.report_to, []
    own = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}
    trackers = []
    for name in names if record.is_writer else []:
        try:
            callback = own[name](record, recipe) if name in own else get_reporting_integration_callbacks([name])[0]()
        except Exception as error:
            _warn_left_out(name, error)
            continue
        if isinstance(callback, Wandb):
            callback.ask = ask
        trackers.append(Tracker(callback))
    return trackers


class Wandb(WandbCallback):
    """One W&B run: its id is in run.json and in the checkpoints, its `_step` is the optimizer step.

    W&B accepts no step twice, so a resumed run first sends the rows of metrics.jsonl that its server lacks,
    and omits the steps that it has (the curve is the same). Offline each start writes its own file, and
    the newest one holds the whole run, so only that one is to be synced. (The client can rewind
    too, `resume_from`, but not offline, and not every server can.) W&B draws all metrics over `_step`
    by default, so no axes are declared.
    """

    def __init__(self, record: Run, recipe: Recipe):
        super().__init__()
        self.record, self.recipe = record, recipe
        self.ask: Ask | None = None
        self.run: Any = None

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        self._initialized = True
        wandb, recipe, facts = self._wandb, self.recipe, self.record.manifest
        if self.ask and not state.global_step:  # a resumed run has asked already
            self.record.update(samples={"before": self._asked(model), "after": []})
        elif recipe.get("eval_dataset_name") and Strategy(facts["strategy"]).shards_weights:
            say(f"W&B is given no sample answers: under {facts['strategy']} no rank has the whole model to ask")
        for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
            os.environ.setdefault(name, PATIENCE)
        # no git: a remote's address may hold a password; the commit is in the configuration
        settings = wandb.Settings(silent=True, console="off", disable_git=True, finish_timeout_raises=True)
        mode = wandb.setup(settings).settings.mode
        project = recipe.values.get("project") or os.environ.get("WANDB_PROJECT") or args.project
        self._asked_for = asked = {
            "id": facts["wandb_run_id"],
            "project": project,
            "entity": recipe.get("wandb_entity"),
            "group": recipe.get("wandb_run_group"),
            "tags": recipe.get("wandb_tags"),
            "name": args.run_name or self.record.folder.name,
            "dir": str(self.record.folder),
            "resume": "allow",
            "config": {key: value for key, value in facts.items() if key not in NOT_CONFIGURATION},
            "settings": settings,
        }
        why = ""
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode, why = "offline", ", since there is no API key"
        try:
            self.run = wandb.init(**asked, mode=mode)
        except Exception as error:
            why = f", since its server cannot be used ({brief(error)})"
            wandb.teardown()  # its service keeps the id of the run that failed to start
            self.run = wandb.init(**asked, mode="offline")
        if mode == "disabled":
            say("W&B is told nothing, since WANDB_MODE is disabled")
        elif self.run.offline:
            say(f"W&B is offline{why}; to upload the run later: wandb sync {self.run.settings.sync_dir}")
        else:
            say(f"W&B shows the run at {without_secrets(self.run.url)}")
        self._catch_up()

    def _catch_up(self) -> None:
        self._next = self.run.step
        for row in self.record.rows():
            self._show(row["step"], row)

    def _show(self, step: int, row: dict[str, Any]) -> None:
        if step >= self._next:
            self.run.log(rewrite_logs({key: row[key] for key in row if key not in NOT_SHOWN}), step=step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" not in logs:  # the closing summary: totals take its place
            self._show(state.global_step, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Ask again. Transformers would save the model here once more, which fails for a sharded one."""
        if self.ask and state.global_step >= state.max_steps:
            before = self.record.manifest.get("samples", {}).get("before", [])
            self.record.update(samples={"before": before, "after": self._asked(model)})

    def _asked(self, model: Any) -> list[dict[str, str]]:
        try:
            return self.ask(model) if self.ask else []
        except Exception as error:
            say(f"⚠ the sample questions fail and are left out: {brief(error)}; W&B gets all else")
            self.ask = None
            return []

    def close(self, code: int) -> None:
        """End the W&B run with the exit code of this one, and wait for the upload, for a limited time.

        Offline, W&B silently stops recording at its first error, such as a disk that is full for a moment: its file is
        checked, and rewritten where it lacks the end.
        """
        if self.run is None:
            return
        self._end(code)
        if self.run.settings.mode != "offline" or self._is_whole():
            return
        say(f"⚠ W&B's file in {self.run.settings.sync_dir} lacks the run's end (was the disk full?); it is rewritten")
        self.run = self._wandb.init(**self._asked_for, mode="offline")
        self._catch_up()
        self._end(code)
        if not self._is_whole():
            raise OSError(f"{self.run.settings.sync_dir} lacks the run's end too")
        say(f"  to upload the run later: wandb sync {self.run.settings.sync_dir}")

    def _is_whole(self) -> bool:
        """Whether the file of this offline run holds its last entry, which W&B's service may write with a delay."""
        file, end = next(Path(self.run.settings.sync_dir).glob("*.wandb")), time.monotonic() + WRITING
        while not (found := self._holds_end(file)) and time.monotonic() < end:
            time.sleep(0.2)
        return found

    def _holds_end(self, file: Path) -> bool:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size // BLOCK - 100) * BLOCK)
            blocks = iter(lambda: stream.read(BLOCK), b"")
            return self._ended.encode() in b"".join(block[7:] for block in blocks)  # each begins with 7 bytes

    def _end(self, code: int) -> None:
        self._ended = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {secrets.token_hex(4)}"
        try:
            self.run.summary["ended"] = self._ended
            if code == 0:
                self._add_results()
            elif code == EXIT_PREEMPTED:
                self.run.mark_preempting()
        finally:
            self._finish(code)

    def _finish(self, code: int) -> None:
        try:
            self.run.finish(exit_code=code)
        except TimeoutError:
            seconds, folder = self.run.settings.finish_timeout, self.run.settings.sync_dir
            say(f"⚠ W&B did not take everything in {seconds:g} s; for the rest: wandb sync {folder}")

    def _add_results(self) -> None:
        wandb, folder = self._wandb, self.record.folder
        self.run.summary.update({f"totals/{key}": value for key, value in self.record.manifest["totals"].items()})
        samples = self.record.manifest.get("samples")
        if samples and samples["after"]:
            self.run.summary["samples"] = wandb.Html(_table(samples["before"], samples["after"]))
        if (folder / "report.html").is_file():
            self.run.summary["report"] = wandb.Html((folder / "report.html").read_text(encoding="utf-8"))
        if self.recipe.get("wandb_log_model") or self._log_model.is_enabled:
            artifact = wandb.Artifact(f"model-{self.run.id}", type="model")
            for file in sorted(folder.iterdir()):
                if file.suffix in (".safetensors", ".json", ".jinja", ".md", ".yaml", ".model"):
                    artifact.add_file(str(file))
            logged, settings = self.run.log_artifact(artifact), self.run.settings
            if settings.mode == "online":
                logged.wait(int(max(MODEL_PATIENCE, settings.finish_timeout)))


class TensorBoard(TensorBoardCallback):
    """All starts of a run write into one folder; steps after the resumed checkpoint are purged."""

    def __init__(self, record: Run, recipe: Recipe):
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(record.folder / "tensorboard")
        begins = record.manifest["resumed"][-1]["step"] + 1 if record.manifest["resumed"] else 0
        super().__init__(SummaryWriter(folder, purge_step=begins if record.logged_until >= 0 else None))
        say(f"TensorBoard shows the run with: tensorboard --logdir {folder}")

    def close(self, code: int) -> None:
        if self.tb_writer:  # the run failed: else Transformers has closed it at the training's end
            self.tb_writer.close()


class Trackio(TrackioCallback):
    """Trackio identifies a run by its name, which therefore holds the run's id; its steps are not sent again."""

    def __init__(self, record: Run, recipe: Recipe):
        super().__init__()
        self.record = record

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        args.run_name = f"{args.run_name or self.record.folder.name}-{self.record.manifest['wandb_run_id']}"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints five lines, which the next one sums up
            super().setup(args, state, model, **kwargs)
        say(f"Trackio shows the run as {args.run_name} with: trackio show --project {args.project}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().on_train_end(*args, **kwargs)
        self._initialized = False

    def close(self, code: int) -> None:
        if self._initialized:  # the run failed before its end
            with contextlib.redirect_stdout(io.StringIO()):
                self._trackio.finish()

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step > self.record.logged_until:
            shown = {key: value for key, value in logs.items() if key not in NOT_SHOWN}
            super().on_log(args, state, control, model, shown, **kwargs)


def _table(before: list[dict[str, str]], after: list[dict[str, str]]) -> str:
    """Answers side by side. Not a `wandb.Table`, which is an artifact and doubles what can fail at the end of a run."""
    rows = [("question", "reference", "before", "after")]
    for first, last in itertools.zip_longest(before, after, fillvalue={"answer": ""}):
        rows.append((last["question"], last["reference"], first["answer"], last["answer"]))
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table border=1>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return without_secrets(f"{type(error).__name__}: {lines[0]}")[:200]


def without_secrets(text: str) -> str:
    """Cut the password that WANDB_BASE_URL may hold, which the client prints."""
    return re.sub(r"//[^/@\s]+@", "//", text)
