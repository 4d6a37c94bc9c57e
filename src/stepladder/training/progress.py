"""Progress that a person can read: one bar on a terminal, plain lines elsewhere, on rank 0 alone."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback

from stepladder.console import say

LINES = 20  # about as many lines a run where the output is a file or a log
BAR = 24  # characters


class Progress(TrainerCallback):
    """Step, loss, speed and time left; evaluations on lines of their own."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.began = 0.0
        self.last_line = 0
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._clear()
            say(f"  step {state.global_step:>5}   held-out loss {logs['eval_loss']:.4f}")
        if "loss" in logs:
            self.loss = logs["loss"]
            self._draw(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.terminal and state.is_world_process_zero:  # the clock runs on between two logged steps
            self._draw(state)

    def _draw(self, state: Any) -> None:
        every = max(1, state.max_steps // LINES)
        if self.terminal:
            print(f"\r{self._line(state)}", end="", flush=True)
        elif state.global_step >= self.last_line + every or state.global_step == state.max_steps:
            say(self._line(state))
            self.last_line = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.terminal and state.is_world_process_zero:
            print(flush=True)

    def _line(self, state: Any) -> str:
        done, total = state.global_step, state.max_steps
        seconds = time.perf_counter() - self.began
        left = seconds / max(done - self.first_step, 1) * (total - done)
        filled = round(BAR * done / total)
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        return f"  step {done:>5}/{total} {'█' * filled}{'·' * (BAR - filled)}{loss}  {_clock(left)} left "

    def _clear(self) -> None:
        if self.terminal:
            print("\r" + " " * 79 + "\r", end="")


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
