"""What is measured while training: metrics.jsonl, tokens per second, peak memory.

Tokens per second are the non-padding tokens that entered the model, over all ranks, by the wall
time of the optimizer steps: evaluation and saving are not in it. `rows_checksum` is the same for
two runs that trained the same rows since the last logged step, in any order, on any number of ranks.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

from transformers import TrainerCallback

from stepladder.run import Run

DROPPED = {"epoch", "num_tokens", "eval_num_tokens", "total_flos"}


class Telemetry(TrainerCallback):
    """Writes metrics.jsonl as the steps are logged, and sums up the totals."""

    def __init__(self, run: Run):
        self.run = run
        self.tokens = 0  # non-padding, all ranks
        self.seconds = 0.0  # in optimizer steps
        self._step_began = 0.0
        self.rows_checksum = 0  # of the rows trained since the last logged step
        self._since_log = (0, 0.0)  # tokens and seconds at the last logged step

    def checkpointed(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        return {key: getattr(self, key) for key in ("tokens", "seconds", "rows_checksum", "_since_log")}

    def restore(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if not state.is_world_process_zero or "train_runtime" in logs:  # the closing summary is in run.json
            return
        row: dict[str, Any] = {"step": state.global_step, "epoch": logs.get("epoch")}
        row |= {key: value for key, value in logs.items() if key not in DROPPED}
        if "loss" in logs:
            tokens, seconds = self.tokens - self._since_log[0], self.seconds - self._since_log[1]
            row["tokens_per_second"] = round(tokens / seconds, 1) if seconds else None
            row["tokens"] = self.tokens
            row["rows_checksum"], self.rows_checksum = self.rows_checksum, 0
            self._since_log = (self.tokens, self.seconds)
        self.run.log(row)


def peak_memory_bytes() -> int:
    """The most memory that this rank has held: the CUDA allocator's count, or the process's resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def totals(telemetry: Telemetry, steps: int) -> dict[str, Any]:
    """The `totals` of run.json; every rank calls it, to tell its peak memory."""
    import torch.distributed as dist

    peaks = [peak_memory_bytes()]
    if dist.is_available() and dist.is_initialized():
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_memory_bytes())
    return {
        "steps": steps,
        "tokens": int(telemetry.tokens),
        "seconds": round(telemetry.seconds, 3),
        "tokens_per_second": round(telemetry.tokens / telemetry.seconds, 1) if telemetry.seconds else None,
        "peak_memory_bytes": peaks,
    }


def final(state: Any) -> dict[str, float]:
    """The last training and evaluation loss of a run, from the trainer's state."""
    last: dict[str, float] = {}
    for entry in state.log_history:
        last |= {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
    return last
