"""Progress that a person can read: some twenty lines a run, and on a terminal a bar below them, on rank 0 alone."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

from stepladder.console import is_main_rank, say
from stepladder.screen import Screen

LINES = 20  # about as many lines a run, which stay: above the bar on a terminal, and in a file or a log
SMOOTHED = 0.2  # the weight of a new loss in the average that the trend compares with


class ProgressLine(TrainerCallback):
    """Step, loss and its trend, learning rate, speed, memory, time left; evaluations on lines of their own."""

    def __init__(self) -> None:
        self.line: Progress | None = None
        self.task = TaskID(0)
        self.last_line = 0
        self.figures = ""
        self.average: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.perf_counter(), state.global_step
        screen = Screen()
        # rich takes any stream for a terminal where FORCE_COLOR is set; isatty() also one that can move no cursor
        if sys.stdout.isatty() and screen.is_interactive and is_main_rank():
            columns = (TextColumn("  step"), MofNCompleteColumn(), BarColumn(16), TextColumn("{task.fields[figures]}"))
            # stderr stays as it is: what libraries say there goes above the line by itself
            self.line = Progress(*columns, console=screen, redirect_stderr=False)
            self.task = self.line.add_task("", total=state.max_steps, completed=state.global_step, figures="")
            self.line.start()
            self.line.console.show_cursor()  # a run that is killed would leave the terminal without one

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            say(f"  step {state.global_step:>5}   held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.figures = self._figures(logs)
        every = max(1, state.max_steps // LINES)
        due = state.global_step >= self.last_line + every or state.global_step == state.max_steps
        self._draw(state)
        if due:
            say(f"  step {state.global_step:>5}/{state.max_steps}  {self.figures}  {self._left(state)}")
            self.last_line = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """What is said next, an error too, has a line of its own."""
        if self.line:
            self.line.stop()

    def _draw(self, state: Any) -> None:
        if self.line:
            figures = f"{self.figures}  {self._left(state)}" if self.figures else ""
            self.line.update(self.task, completed=state.global_step, figures=figures)

    def _figures(self, logs: dict[str, Any]) -> str:
        loss, before = logs["loss"], self.average
        self.average = loss if before is None else before + SMOOTHED * (loss - before)
        trend = " " if before is None or loss == before else "↓" if loss < before else "↑"
        speed, memory = logs.get("tokens_per_second", 0), logs["peak_memory_bytes"] / 2**30
        return f"loss {loss:.4f}{trend} lr {logs['learning_rate']:.2g}  {speed:,.0f} tok/s  {memory:.1f} GiB"

    def _left(self, state: Any) -> str:
        done = max(state.global_step - self.first_step, 1)
        seconds = (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step)
        hours, rest = divmod(round(seconds), 3600)
        return (f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}") + " left"
