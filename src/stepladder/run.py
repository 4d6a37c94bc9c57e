"""The run folder as a run writes it: locked, replaced or resumed, its manifest and metrics kept whole."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.console import say
from stepladder.errors import LaunchError, TrainingError, lost_a_rank
from stepladder.files import LINE_BYTES, PART_SUFFIX, append_atomic, lock_file, remove, write_atomic
from stepladder.manifest import LOCK, MANIFEST, METRICS, RECIPE, read_manifest, read_metrics

PACKAGES = (
    "stepladder",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
)
REPLACED, REMOVED = ".replaced", ".replaced-removed"  # the run that --overwrite replaces, until this one has begun
# Files of these prefixes are the job's, written before the run begins, and not the run's.
JOB_LOGS = ("slurm-", "nccl-")
LOCK_PATIENCE = 30  # seconds: a rank that outlived its launcher saves a checkpoint first


class Run:
    """A run folder, written by rank 0; the other ranks know its path only."""

    def __init__(self, folder: Path, is_writer: bool):
        self.folder, self.is_writer = folder, is_writer
        self.manifest: dict[str, Any] = {}
        self.logged_until = -1  # the step to which metrics were logged before this start
        self.replaces = False  # the run that the folder holds gives way once this one trains
        self.allowed: list[str] = []  # facts that may differ from those of the run that is resumed
        self.changes: dict[str, list[Any]] = {}  # keys in which a resumed run differs from the start before: old, new
        self._since = 0.0  # by the monotonic clock: when the run would have begun, had it had one start only
        self.forgets_best = False  # the best step so far and the coming ones are not measured alike
        self._rows = ""  # of metrics.jsonl, not written yet
        self._unwritten: OSError | None = None  # why the last try to write failed

    def lock(self) -> None:
        """Lock the folder until this process ends.

        Raises:
            LaunchError: another one trains into it, or it cannot be written.
        """
        for second in range(LOCK_PATIENCE + 1):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock_file(self.folder / LOCK)
                return
            except BlockingIOError:
                if second == 0:
                    say(f"another process is training into {self.folder}: waiting {LOCK_PATIENCE} s for it to end")
                time.sleep(1)
            except OSError as error:
                where = self.folder if error.errno != errno.ELOOP else f"{self.folder / LOCK}, a link,"
                raise LaunchError(f"output_dir {where} cannot be written: {error.strerror}") from None
        raise LaunchError(
            f"another process is training into {self.folder}",
            why="two would overwrite each other's files",
            help="wait for it or end it (its launcher may be gone: look for sft in `ps`), or another --output_dir",
        )

    def exists(self, where: str = "") -> bool:
        """Whether the folder holds a run.

        Raises:
            LaunchError: it holds files that are no run's, which no flag removes.
        """
        if (self.folder / MANIFEST).is_file():
            return True
        # Metrics are kept while a run is made ready to start anew.
        if any(file.name != METRICS or not file.is_file() for file in self._files()):
            raise LaunchError(
                f"output_dir {self.folder} exists and is no run folder",
                where=where,
                why="nothing that existed is overwritten",
                help="another --output_dir",
            )
        return False

    def clear(self, but: str = "") -> None:
        for file in self._files():
            if file.name != but:
                remove(file)

    def _files(self) -> list[Path]:
        """The run's own files, the manifest last: a folder whose files are being removed or moved is still a run's.

        Not the queue's, nor what a kill left of a file that was being written.
        """
        files = [file for file in self.folder.iterdir() if not file.name.startswith((LOCK, *JOB_LOGS, REPLACED))]
        files = [file for file in files if not (file.name.startswith(".") and file.name.endswith(PART_SUFFIX))]
        return sorted(files, key=lambda file: file.name == MANIFEST)

    def replaced_bytes(self) -> int:
        """Bytes that `drop_replaced` will free."""
        if not self.replaces:
            return 0
        return sum(file.lstat().st_size for file in self.folder.rglob("*") if not file.name.startswith(JOB_LOGS))

    def _move_aside(self) -> None:
        old = self.folder / REPLACED
        if (old / MANIFEST).is_file():  # a start that was killed before it trained: what it wrote is not kept
            return self.clear()
        old.mkdir(exist_ok=True)
        for file in self._files():
            file.rename(old / file.name)

    def put_back(self) -> None:
        """Restore the run that a failed or killed start was to replace.

        A start that was killed after it had written its own manifest goes on instead.
        """
        old = self.folder / REPLACED
        if not self.is_writer or not old.is_dir():
            return
        if self.replaces:
            self.clear()
            self.is_writer = False  # the manifest is the other run's again
        elif (old / MANIFEST).is_file() and (self.folder / MANIFEST).is_file():
            return
        for file in sorted(old.iterdir(), key=lambda file: file.name != MANIFEST):
            file.rename(self.folder / file.name)
        old.rmdir()
        say(f"the run in {self.folder} stays: the one that was to replace it has trained nothing")

    def drop_replaced(self) -> None:
        """Remove the run that this one replaces, and leftovers of an interrupted removal."""
        old, removed = self.folder / REPLACED, self.folder / REMOVED
        with contextlib.suppress(OSError):  # it may lie there until the folder itself goes
            if removed.is_dir():
                remove(removed)
            if old.is_dir():
                old.rename(removed)  # at once: a part of a run is never put back
                remove(removed)

    def read(self) -> dict[str, Any]:
        """The manifest on the disk.

        Raises:
            LaunchError: it cannot be read, or holds other kinds of values than a start needs.
        """
        try:
            return read_manifest(self.folder, ("status", "recipe"))
        except ValueError as error:
            raise self._unreadable(str(error)) from None

    def _unreadable(self, why: str) -> LaunchError:
        return LaunchError(
            f"{self.folder / MANIFEST} cannot be used: {why}",
            help="put it back from a copy, another --output_dir, or --overwrite to replace the run",
        )

    def is_requeued(self) -> bool:
        """Whether the last start belonged to this Slurm job, which has been requeued since."""
        job = slurm_job()
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged manifest is not this job's
            before = read_manifest(self.folder)["slurm"]
            return bool(job and before["job_id"] == job["job_id"] and before["restart_count"] < job["restart_count"])
        return False

    def begin(self, recipe_yaml: str, resumed: dict[str, Any] | None = None, **facts: Any) -> None:
        """Write the resolved recipe and the manifest with `status: running`.

        A run that is resumed keeps its start and its past, and its metrics up to the checkpoint's
        step: no gap, no repeat. One that starts anew by itself keeps its id in W&B.

        Args:
            resumed: of the checkpoint: `step`, `from`, `owes_evaluation`.
            facts: of this start.

        Raises:
            LaunchError: the global batch or the training data are not those of the run that is resumed, or the
                folder cannot be written.
        """
        if resumed and self.is_writer:
            self._check_same(facts)
        now, self._since = time.strftime("%Y-%m-%dT%H:%M:%S%z"), self._began()
        past = {"started": now, "resumed": [], **(self.manifest if resumed else {})}
        past.setdefault("started_with", past.get("packages") or package_versions())
        past["progress"] = self.manifest.get("progress") or {"step": 0, "starts": 1}
        known = self.manifest.get("wandb_run_id") or os.environ.get("WANDB_RUN_ID")
        past["wandb_run_id"] = known or secrets.token_hex(4)  # one run there, however often it is resumed
        for key in ("error", "ended", "stopped_early"):  # of the start before
            past.pop(key, None)
        self.manifest = {
            **past,
            "status": "running",
            "git_commit": git_commit(),
            "packages": package_versions(),
            "slurm": slurm_job(),
            **facts,
        }
        if resumed:
            here = {"world_size": facts["world_size"], "strategy": facts["strategy"]}
            here |= {"changes": self.changes} if self.changes else {}
            self.manifest["resumed"] = [*past["resumed"], {**resumed, "at": now, **here}]
        if self.is_writer:
            try:
                if self.replaces:
                    self._move_aside()
                self._write()  # first: by it the next start knows the folder for a run's, however little follows
                write_atomic(self.folder / RECIPE, recipe_yaml)
                self._rewind(resumed["step"] if resumed else -1, bool(resumed and resumed.get("owes_evaluation")))
            except OSError as error:
                raise LaunchError(
                    f"output_dir {self.folder} cannot be written: {error.strerror}",
                    help="make room, then the same command again",
                ) from None

    def _began(self) -> float:
        """When this process began, less the recorded seconds of the starts before it."""
        # With a manifest the run is resumed or started again. The seconds only grow, so the last rows have the most.
        rows = (row for _, row in read_metrics(self.folder, last=LINE_BYTES) if row)
        before = itertools.chain([self.manifest], rows) if self.manifest else ()
        spent = (value for row in before if isinstance(value := row.get("elapsed_seconds"), int | float))
        return time.perf_counter() - process_seconds() - max(filter(math.isfinite, spent), default=0.0)

    @property
    def elapsed(self) -> float:
        """Seconds of all starts so far, each from its command on; of a killed one, to its last metrics."""
        return time.perf_counter() - self._since

    def _check_same(self, facts: dict[str, Any]) -> None:
        """Raise LaunchError if the global batch or the rows of a resumed run changed; its recipe shows neither."""
        before, now = self.manifest, facts
        try:
            changes = {
                "global_batch_size": (before["global_batch_size"], now["global_batch_size"]),
                "dataset_name": (before["datasets"][0]["sha256"], now["datasets"][0]["sha256"]),
            }
        except (KeyError, IndexError, TypeError):
            raise self._unreadable("it lacks the global batch size or the training set") from None
        for key, (old, new) in changes.items():
            names = {key, "datasets"} if key == "dataset_name" else {key}  # whose rows these are
            if old == new:
                continue
            if by := names.intersection(self.allowed):
                say(f"⚠ changed since the run began, which --allow_change {min(by)} allows: {key} {old} → {new}")
            else:
                raise LaunchError(
                    f"the run in {self.folder} was begun with another {key}: {old}, now {new}",
                    why="its curve would not go on as it began",
                    help=f"global_batch_size: {old}"
                    if key == "global_batch_size"
                    else "the rows that it began with; or to go on with these: --allow_change dataset_name",
                )

    def _rewind(self, step: int, owes_evaluation: bool = False) -> None:
        """Keep the metrics up to a step. An incomplete last line is dropped; other damaged lines are counted.

        Not those of an evaluation of that step which is repeated.
        """
        damaged, self.logged_until = 0, step

        def kept() -> Iterator[bytes]:
            nonlocal damaged
            for line, row in read_metrics(self.folder):
                damaged += row is None and line.endswith(b"\n")
                self.logged_until = max(self.logged_until, row["step"] if row else step)
                repeated = row and owes_evaluation and row["step"] == step and "eval_loss" in row
                if row and row["step"] <= step and not repeated:
                    yield line.rstrip(b"\n") + b"\n"

        write_atomic(self.folder / METRICS, kept())
        if damaged:
            say(f"⚠ {self.folder / METRICS} has {damaged} damaged line{'s' * (damaged > 1)}: left out")

    def update(self, **facts: Any) -> None:
        self.manifest.update(facts)
        if self.is_writer:
            self._keep()

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_writer:
            self.drop_replaced()
            self._rows += json.dumps(row) + "\n"
            self._keep(manifest=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The undamaged lines of metrics.jsonl, read one by one."""
        return (row for _, row in read_metrics(self.folder) if row)

    def _keep(self, manifest: bool = True) -> None:
        """Write what is new. On a full disk the run goes on, and the next call retries all of it."""
        try:
            if self._rows:
                append_atomic(self.folder / METRICS, self._rows.encode())
                self._rows = ""
            if manifest or self._unwritten:
                self._write()
            self._unwritten = None
        except OSError as error:
            if not self._unwritten:
                say(f"⚠ {self.folder} cannot be written ({error.strerror}): the run goes on, and tries again")
            self._unwritten = error

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the status at the end of a block: `finished` if none was set, `failed` with the reason if it raises.

        Raises:
            TrainingError: at the end the disk still takes no more.
        """
        try:
            yield
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:2000]
            self.update(status="failed", error="another rank ended" if lost_a_rank(error) else said)
            self.put_back()
            raise
        if self.manifest["status"] == "running":
            self.update(status="finished", ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        if self._unwritten:
            raise TrainingError(
                f"{self.folder / MANIFEST} and {METRICS} lack the end of the run",
                why=f"they cannot be written: {self._unwritten.strerror}",
                help="make room; the same command again goes on from the newest whole checkpoint",
            )

    def _write(self) -> None:
        if self._since:
            self.manifest["elapsed_seconds"] = round(self.elapsed, 3)
        write_atomic(self.folder / MANIFEST, json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def slurm_job() -> dict[str, Any] | None:
    """The Slurm job of this start, and how often it was requeued; None outside of Slurm."""
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return None
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return {"job_id": job, "restart_count": restarts, "nodes": os.environ.get("SLURM_JOB_NODELIST")}


def process_seconds() -> float:
    """Seconds since this process was started."""
    if sys.platform == "linux":
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    import psutil

    return time.time() - float(psutil.Process().create_time())


def git_commit() -> str | None:
    """The commit of the working folder, with `+` where files differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):

        def git(*words: str) -> str:
            return subprocess.run(("git", *words), capture_output=True, encoding="utf-8", check=True).stdout.strip()

        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return None
