"""A rank that hangs takes the others with it, silently: a watchdog says where each one stands, and ends the job."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Any

from transformers import TrainerCallback

from stepladder import errors
from stepladder.run import Run


class Watchdog(TrainerCallback):
    """Dumps the Python stacks of this rank and exits with 1 where nothing has moved for `limit` seconds.

    What moves is a micro-batch, an evaluated batch, a save. It counts from the first step on:
    how long data takes to prepare, or a resumed stream to skip, is nobody's fault. Each rank watches
    itself; the others stand still in a collective and reach the limit with it. Below torch's
    own limit (`ddp_timeout`, 1800 s), which names no line.
    """

    def __init__(self, run: Run, limit: float, rank: int):
        self.run, self.limit, self.rank = run, limit, rank
        self._moved: float | None = None
        self._ended = threading.Event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._moved is None:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        self._moved = time.monotonic()
        self._step = state.global_step + 1

    def _move(self, *args: Any, **kwargs: Any) -> None:
        self._moved = time.monotonic()

    on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = on_log = _move

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.limit / 10)):
            assert self._moved is not None
            if time.monotonic() - self._moved > self.limit:
                self._end()

    def _end(self) -> None:
        file = self.run.folder / f"hang-rank-{self.rank}.txt"
        with file.open("w") as out:
            faulthandler.dump_traceback(out, all_threads=True)
        fault = errors.TrainingError(
            f"[rank {self.rank}] nothing has moved for {self.limit:g} s in step {self._step}",
            why=f"where it stands: {file}",
            help="compare the files of all ranks: the one that waits in no collective is the cause",
        )
        print(fault.render(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        errors.tell_launcher(fault.what, fault.render())
        self.run.update(status="failed", error=fault.what)
        os._exit(errors.EXIT_FAILED)
