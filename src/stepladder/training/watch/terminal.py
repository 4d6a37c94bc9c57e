"""What a run prints: the opening block, its progress, where the time of profiled steps went, and the closing block."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.autograd import DeviceType
from transformers import TrainerCallback

from stepladder import installation
from stepladder.console import is_main_rank, quote_for_shell, say
from stepladder.errors import StepladderError
from stepladder.manifest import stop_reason
from stepladder.model import card, start
from stepladder.recipe.recipe import Recipe
from stepladder.run import Run
from stepladder.screen import Screen
from stepladder.settings import VIRTUAL

PROGRESS_LINES = 20  # about as many lines per run stay: above the bar on a terminal, and in a file or a log
SMOOTHING = 0.2  # the weight of a new loss in the average that the trend compares with
WARM_UP_STEPS, PROFILED_STEPS = 2, 2
LARGEST_COSTS = 5
TRACE = "profile.json"
OPERATION_WORDS = {
    "mm": "matrix products",
    "addmm": "matrix products with a bias",
    "bmm": "batched matrix products",
    "linear": "linear layers",
    "mul": "elementwise products",
    "add": "sums",
    "add_": "sums in place, such as gradients",
    "copy_": "copies and casts to another type",
    "_softmax": "softmax",
    "_log_softmax": "the loss's softmax",
    "log_softmax_backward_data": "the gradient of the loss's softmax",
    "embedding_dense_backward": "the embedding's gradient",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "the gradient of attention",
    "silu": "the activation",
    "silu_backward": "the gradient of the activation",
    "cat": "joining tensors",
    "bitwise_and": "masks",
    "eq": "comparisons",
    "item": "waiting for a value",
    "_local_scalar_dense": "waiting for a value",
    "_foreach_addcdiv_": "the optimizer",
    "_fused_adamw_": "the optimizer",
}


def opening_block(
    run: Run, recipe: Recipe, steps: int | None, sequences: int | None, attention: str, notes: list[str]
) -> str:
    """What a run will do, printed before it begins.

    Args:
        steps: of the whole run; None where unknown, as `sequences` per epoch is for a stream.
        attention: the implementation, and whether rows are padded.
    """
    f = run.manifest
    counts, origin = f["parameters"], f["starts_from"]
    data = ", ".join(f"{d['name']} ({d['rows']} rows)" for d in f["datasets"])
    ranks = f"{f['world_size']} rank{'s' * (f['world_size'] > 1)}"
    adapter = (
        [f"adapter     {origin['adapter']} is trained on; its base is {origin['base']}"] if "adapter" in origin else []
    )
    epochs = f" ({steps / math.ceil(sequences / f['global_batch_size']):.3g} epochs)" if steps and sequences else ""
    return "\n".join(
        (
            f"recipe      {f['recipe_name']} ({f['recipe_hash']}) → {run.folder}",
            f"ranks       {ranks} under {f['strategy']}: {', '.join(f['devices'])}",
            f"batch       {f['micro_batch_size']} micro-batch × {f['gradient_accumulation_steps']} accumulation "
            f"× {ranks} = {f['global_batch_size']} global{_unused(f)}",
            f"precision   {f['precision']}",
            f"attention   {attention}",
            f"parameters  {counts['trainable']:,} trainable of {counts['all']:,} "
            f"({100 * counts['trainable'] / counts['all']:.2f} %)",
            f"data        {data}",
            *adapter,
            f"run         {card.training_method(recipe)}, {_at_most(recipe)}{steps} steps{epochs}, "
            f"{_checkpoints(recipe)}",
            f"watch       {_watched(recipe, f['plan'])}",
            *(f"resumed     from step {r['step']}, {r['from']}" for r in f["resumed"][-1:]),
            *(f"note        {note}" for note in notes),
        )
    )


def _at_most(recipe: Recipe) -> str:
    return "at most " if recipe.get("early_stopping_patience") else ""


def _checkpoints(recipe: Recipe) -> str:
    every = {"no": "no checkpoints", "epoch": "a checkpoint each epoch", "best": "a checkpoint at each better loss"}
    strategy = str(getattr(recipe.get("save_strategy"), "value", recipe.get("save_strategy")))
    steps = recipe.get("save_steps")
    share = f"{100 * steps:g} % of the run" if steps < 1 else f"{steps:g} steps" if steps > 1 else "step"
    return every.get(strategy, f"a checkpoint every {share}")


def _watched(recipe: Recipe, plan: dict[str, Any]) -> str:
    """Where the metrics go, and the planned peak memory."""
    names = recipe.get("report_to") or []
    names = [names] if isinstance(names, str) else names
    told = ", ".join(["metrics.jsonl", *(name for name in names if name != "none")])
    memory = plan.get("peak_memory_bytes")
    return told + (f"; {memory / 2**30:.1f} GiB of tensors planned at most on a rank" if memory else "")


def _unused(f: dict[str, Any]) -> str:
    """Slots of a step without a row, which cost time and change nothing."""
    places = f["micro_batch_size"] * f["gradient_accumulation_steps"] * f["world_size"]
    empty = places - f["global_batch_size"]
    return f", {empty} of {places} places empty (another per_device_train_batch_size may take none)" if empty else ""


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
        # with FORCE_COLOR rich takes any stream for a terminal; isatty() also a terminal that cannot move the cursor
        if sys.stdout.isatty() and screen.is_interactive and is_main_rank():
            columns = (TextColumn("  step"), MofNCompleteColumn(), BarColumn(16), TextColumn("{task.fields[figures]}"))
            # stderr stays as it is: what libraries print there appears above the bar anyway
            self.line = Progress(*columns, console=screen, redirect_stderr=False)
            self.task = self.line.add_task("", total=state.max_steps, completed=state.global_step, figures="")
            self.line.start()
            self.line.console.show_cursor()  # else a killed run would leave the terminal without one

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            say(f"  step {state.global_step:>5}   held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.figures = self._figures(logs)
        every = max(1, state.max_steps // PROGRESS_LINES)
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
        """End the bar, so that what is printed next begins on a line of its own."""
        if self.line:
            self.line.stop()

    def _draw(self, state: Any) -> None:
        if self.line:
            figures = f"{self.figures}  {self._left(state)}" if self.figures else ""
            self.line.update(self.task, completed=state.global_step, figures=figures)

    def _figures(self, logs: dict[str, Any]) -> str:
        loss, before = logs["loss"], self.average
        self.average = loss if before is None else before + SMOOTHING * (loss - before)
        trend = " " if before is None or loss == before else "↓" if loss < before else "↑"
        speed, memory = logs.get("tokens_per_second", 0), logs["peak_memory_bytes"] / 2**30
        return f"loss {loss:.4f}{trend} lr {logs['learning_rate']:.2g}  {speed:,.0f} tok/s  {memory:.1f} GiB"

    def _left(self, state: Any) -> str:
        done = max(state.global_step - self.first_step, 1)
        seconds = (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step)
        hours, rest = divmod(round(seconds), 3600)
        return (f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}") + " left"


class Profile(TrainerCallback):
    """Profiles two steps of rank 0 per start: a trace in the run folder (ui.perfetto.dev opens it), and a summary."""

    def __init__(self, run: Run):
        self.run = run
        self._steps = 0  # of this start
        self._profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps == WARM_UP_STEPS:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        self._steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps == WARM_UP_STEPS + PROFILED_STEPS or state.global_step >= state.max_steps:
            self._end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()
        if self._steps <= WARM_UP_STEPS:
            say(f"⚠ --profile recorded nothing: it leaves out {WARM_UP_STEPS} steps, and this start had {self._steps}")

    def _end(self) -> None:
        if self._profiler:
            self._profiler.stop()
            trace = self.run.folder / TRACE
            trace.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # on a full disk it raises this, or leaves no file
                self._profiler.export_chrome_trace(str(trace))
            for line in cost_lines(self._profiler.key_averages(), self._steps - WARM_UP_STEPS):
                say(line)
            if trace.is_file():
                say(f"  the whole trace: {trace}, which ui.perfetto.dev opens")
            else:
                say(f"  the whole trace could not be written: {trace}")
            self._profiler = None


def cost_lines(averages: Any, steps: int) -> list[str]:
    """The operations that take the most time themselves, without the operations that they call.

    On a GPU the profiler counts a kernel's time with the operator that launched it, with the kernel itself and with the
    annotations around it: only operators are counted here.
    """
    on_gpu = any(average.self_device_time_total for average in averages)
    if on_gpu:
        averages = [
            average for average in averages if average.device_type == DeviceType.CPU and not average.is_user_annotation
        ]

    def cost(average: Any) -> float:
        return float(average.self_device_time_total if on_gpu else average.self_cpu_time_total)  # microseconds

    total = sum(map(cost, averages)) or 1.0
    count = f"{steps} steps spend their" if steps > 1 else "a step spends its"
    lines = [f"  where {count} time on the {'GPU' if on_gpu else 'CPU'}:"]
    for average in sorted(averages, key=cost, reverse=True)[:LARGEST_COSTS]:
        share, words = 100 * cost(average) / total, OPERATION_WORDS.get(average.key.removeprefix("aten::"), "")
        what = f"{words} ({average.key})" if words else average.key
        lines.append(f"  {share:5.1f} %  {cost(average) / 1000:,.1f} ms in {average.count:,} calls of {what}")
    return lines


def closing_block(run: Run) -> str:
    """The result of a finished run, where it is, and what to do next."""
    totals, last = run.manifest["totals"], run.manifest["final"]
    losses = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in last.items())  # none of a short run
    starts = len(run.manifest["resumed"]) + 1
    used = f", MFU {100 * totals['mfu']:.1f} %" if totals.get("mfu") else ""
    memory = max(totals["peak_memory_bytes"]) / 2**30
    best, folder = run.manifest["result_step"], quote_for_shell(run.folder)
    lines = [
        f"✔ {totals['steps']} steps in {totals['seconds']:.0f} s{losses}",
        f"  {totals['tokens_per_second'] or 0:,.0f} tokens/s{used}, {memory:.1f} GiB at most on a rank",
        f"  goodput {100 * totals['goodput']:.0f} %: {totals['seconds']:,.0f} s of steps in "
        f"{totals['seconds'] / totals['goodput']:,.0f} s" + (f" over {starts} starts" if starts > 1 else ""),
        *([f"  {stop_reason(stopped)}"] if (stopped := run.manifest.get("stopped_early")) else []),
        *([f"  the result is step {best}, the best of the evaluations"] if best != totals["steps"] else []),
        f"  {run.folder}/ holds the result, run.json, metrics.jsonl and recipe.yaml; open report.html",
        f'  ask it:      {installation.command("generate")} --model {folder} --prompt "…"',
    ]
    recipe = run.manifest["recipe"]
    base = quote_for_shell(recipe["model_name_or_path"])
    held_out = run.manifest.get("held_out", {"rows": 0, "foreign": ""})  # counted by the rank that writes
    if held_out["rows"]:
        lines.append(f"  compare it:  {installation.command('compare')} --base {base} --tuned {folder}")
    if held_out["foreign"]:
        lines.append(f"  ⚠ it was evaluated on {held_out['foreign']}, which came with other training data")
    if recipe.get("use_peft") and recipe.get("peft_type", "lora") not in VIRTUAL:  # virtual tokens cannot be merged
        lines.append(f"  merge it:    {start.merge_command(run.folder, recipe)}")
    return "\n".join(lines)


def write_page(write: Callable[..., Any], folder: Path, *args: Any) -> None:
    """Write a page of a finished run. An error is printed, and the result stands without its page."""
    try:
        write(folder, *args)
    except Exception as error:
        cause = (
            f"{error.what}: {error.why}" if isinstance(error, StepladderError) else f"{type(error).__name__}: {error}"
        )
        say(f"⚠ the pages of {folder} are not whole: {cause}")
        again = f"{installation.command('report')} {quote_for_shell(folder)}"
        say(f"  the result stands; for its page, once that is mended: {again}")


def preemption_message(run: Run) -> str:
    """That the run stopped on a signal, and how to resume it."""
    if not (steps := run.manifest["totals"]["steps"]):
        return "stopped before the first step: the same command again starts from the beginning (exit code 75)"
    if run.manifest["reached_stop"]:
        return f"✔ step {steps} is reached and saved: without --stop_at_step the same command resumes there"
    return f"stopped after step {steps}, and saved: the same command again goes on from there (exit code 75)"
