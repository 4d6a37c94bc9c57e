"""Where the time of a step goes: two steps under torch.profiler, and its largest costs in words."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import TrainerCallback

from stepladder.console import say
from stepladder.run import Run

BEFORE = 2  # steps that warm up first
STEPS = 2
SHOWN = 5
TRACE = "profile.json"


class Profile(TrainerCallback):
    """Records two steps of rank 0 once a start: a trace in the run folder (ui.perfetto.dev opens it), and a summary."""

    def __init__(self, run: Run):
        self.run = run
        self._steps = 0  # of this start
        self._profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps == BEFORE:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        self._steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps == BEFORE + STEPS or state.global_step >= state.max_steps:
            self._end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()
        if self._steps <= BEFORE:
            say(f"⚠ --profile recorded nothing: it leaves out {BEFORE} steps, and this start had {self._steps}")

    def _end(self) -> None:
        if self._profiler:
            self._profiler.stop()
            trace = self.run.folder / TRACE
            trace.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # on a full disk it raises this, or leaves no file
                self._profiler.export_chrome_trace(str(trace))
            for line in costs(self._profiler.key_averages(), self._steps - BEFORE):
                say(line)
            if trace.is_file():
                say(f"  the whole trace: {trace}, which ui.perfetto.dev opens")
            else:
                say(f"  the whole trace could not be written: {trace}")
            self._profiler = None


def costs(averages: Any, steps: int) -> list[str]:
    """The operations that cost most by themselves, without those that they call.

    On a GPU the time of its kernels stands with the operators that started them, and once more with the
    kernels themselves and with the annotations around them: the operators alone count.
    """
    on_gpu = any(one.self_device_time_total for one in averages)
    if on_gpu:
        averages = [one for one in averages if one.device_type == DeviceType.CPU and not one.is_user_annotation]

    def cost(one: Any) -> float:
        return float(one.self_device_time_total if on_gpu else one.self_cpu_time_total)  # microseconds

    total = sum(map(cost, averages)) or 1.0
    count = f"{steps} steps spend their" if steps > 1 else "a step spends its"
    lines = [f"  where {count} time on the {'GPU' if on_gpu else 'CPU'}:"]
    for one in sorted(averages, key=cost, reverse=True)[:SHOWN]:
        share, words = 100 * cost(one) / total, WORDS.get(one.key.removeprefix("aten::"), "")
        what = f"{words} ({one.key})" if words else one.key
        lines.append(f"  {share:5.1f} %  {cost(one) / 1000:,.1f} ms in {one.count:,} calls of {what}")
    return lines


WORDS = {
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
