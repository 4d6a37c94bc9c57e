"""What is measured while training: metrics.jsonl, throughput, data waits, memory, FLOPs; all metrics are defined here.

`tokens_per_second` counts the non-padding tokens that entered the model, over all ranks, by the wall time
of the optimizer steps: waiting for their data is included, evaluation and saving are not. Loss tokens
(`trained_tokens`) are counted apart. `padding` is the share of a batch's slots that hold no token. `mfu` and `hfu`
are the shares of the hardware's peak rate that the model's operations take (`Work`), without and with the second
forward pass of gradient checkpointing. All clocks are monotonic, so setting the system's clock changes nothing.
`rows_checksum` is the same for two runs that trained the same rows since the last logged step, in
any order, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from stepladder import hardware
from stepladder.model.flops import Flops, count_experts, count_flops
from stepladder.run import Run, process_seconds

DROPPED = {"epoch", "num_tokens", "eval_num_tokens", "total_flos"}
LOAD = ("cpu_percent", "memory_percent", "gpu_percent", "gpu_memory_percent")  # of a node
PASSES = 1000  # forward passes whose CUDA events are kept, however rarely a step is logged
HISTORY = 100  # entries of log_history that are kept, and as many more until it is cut; metrics.jsonl has all
COUNTED = ("tokens", "trained_tokens", "places", "pairs", "steps", "seconds", "waited")
# Rows and columns of the matrices whose product measures a rate: on a GPU the work must outlast the launch.
GEMM, GEMM_ON_GPU = 1024, 8192
# In its first tenth of a second a CPU may run both threads on one core, at half the rate: the MFU was 111 %.
MEASURED_SECONDS = 0.25


@dataclass(frozen=True)
class Work:
    """The operations of one model on one kind of hardware.

    Args:
        flops: the operations of the model (`model/flops.py` derives them).
        recomputes: whether the backward pass computes the forward pass again (gradient checkpointing).
        peak: operations per second, all ranks together.
        peak_source: where the peak is from.
    """

    flops: Flops
    recomputes: bool
    peak: float
    peak_source: str

    def shares(self, tokens: int, pairs: int, seconds: float) -> tuple[float, float]:
        """MFU and HFU of `tokens` with `pairs` query–key pairs in `seconds`; HFU adds the recomputed forward pass."""
        model, possible = self.flops.count_training(tokens, pairs), self.peak * seconds
        return model / possible, (model + self.recomputes * self.flops.count_forward(tokens, pairs)) / possible


def model_work(model: Any, counts: dict[str, int], args: Any, precision: str) -> Work | None:
    """The work of a model; None where the formula does not apply (experts, no attention)."""
    config = model.config.get_text_config()
    if not getattr(config, "num_attention_heads", None) or count_experts(config):
        return None
    flops = count_flops(config, counts["all"], counts["trainable"], full=counts["trainable"] == counts["all"])
    rate, source = peak_rate(args.device, precision)
    return Work(flops, args.gradient_checkpointing, rate * args.world_size, source)


def peak_rate(device: Any, precision: str) -> tuple[float, str]:
    """The peak of one device in operations per second, and its source: a data sheet, else a measurement here."""
    if device.type == "cuda" and (row := hardware.gpu(torch.cuda.get_device_name(device))):
        return row.tflops * 1e12, f"{row.source}, dense {'bf16' if row.bf16 else 'fp16'}"
    dtype = hardware.dtype_of(precision)
    size = GEMM_ON_GPU if device.type == "cuda" else GEMM
    ones = torch.ones(size, size, dtype=dtype, device=device)  # not random: the run's random generators are not touched
    seconds: list[float] = []
    while sum(seconds) < MEASURED_SECONDS:
        began = time.perf_counter()
        (ones @ ones)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    source = f"the best of {MEASURED_SECONDS} s of {size}×{size} matrix products in {precision} at the start"
    return 2 * size**3 / min(seconds), source


class Telemetry(TrainerCallback):
    """Counts and times the steps, and writes metrics.jsonl as they are logged.

    Args:
        work: the operations of the model; None where they are unknown: there is no MFU then.
        ranks_a_node: with more ranks than these, each node's load is logged too.
    """

    def __init__(self, run: Run, work: Work | None = None, ranks_a_node: int = 0):
        self.run, self.work, self.ranks_a_node = run, work, ranks_a_node
        # Over all ranks, since the run began: tokens, loss tokens, slots of the batches, query–key pairs;
        # optimizer steps, their seconds, and the seconds in which a rank waited for data.
        self.tokens = self.trained_tokens = self.places = self.pairs = self.steps = 0
        self.seconds = self.waited = 0.0
        self.rows_checksum = 0  # of the rows trained since the last logged step
        self.step_seconds = array("d")  # of each step since this start
        self.save_seconds: list[float] = []  # that each checkpoint of this start delayed the steps
        self.first_step: float | None = None  # seconds from this start's command to its first step
        self._since_log: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self._waits = self._forward = 0.0  # of this rank, since the last logged step
        self._events: list[tuple[Any, Any]] = []  # around each forward pass on a GPU, which runs on by itself
        self._began: float | None = None
        load("cpu")  # psutil measures the use of the processors since the previous call

    def to_checkpoint(self) -> dict[str, Any]:
        """The counts from which a resumed run continues."""
        return {key: getattr(self, key) for key in (*COUNTED, "rows_checksum", "_since_log")}

    def restore(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def count(self, checksum: int, tokens: int, trained: int, places: int, pairs: int) -> None:
        """Add a step's rows, summed over all ranks (`batches.StepRows`)."""
        self.rows_checksum += checksum
        self.tokens += tokens
        self.trained_tokens += trained
        self.places += places
        self.pairs += pairs

    def batches(self, loader: Iterator[Any]) -> Iterator[Any]:
        """A step's batches, at whose first one the step begins; counts how long each is waited for.

        The first batch of a start is not counted, since workers start and a resumed stream is skipped before it.
        """
        first, began = self._began is None, time.perf_counter()
        self._began = began
        for batch in loader:
            now = time.perf_counter()
            if first:
                self._began, self.first_step = now, self.first_step or process_seconds()
            else:
                self._waits += now - began
            yield batch
            first, began = False, time.perf_counter()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time the saving of a checkpoint."""
        began = time.perf_counter()
        yield
        self.save_seconds.append(time.perf_counter() - began)

    @contextlib.contextmanager
    def forward(self, device: Any) -> Iterator[None]:
        """Time a forward pass: under DDP a rank waits for no other in it, so it shows the slow ones."""
        if device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            if len(self._events) > 2 * PASSES:
                self._sum_passes(PASSES)
        else:
            began = time.perf_counter()
            yield
            self._forward += time.perf_counter() - began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._began is not None
        halts = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if halts and args.device.type != "cpu":
            # The optimizer may still run on the device. Usually the next step waits for it, but what follows now
            # belongs to no step.
            torch.accelerator.synchronize(args.device)
        self.step_seconds.append(time.perf_counter() - self._began)
        self.seconds += self.step_seconds[-1]
        self.steps += 1

    def step_metrics(self, device: Any) -> dict[str, float]:
        """The metrics of the steps since the last logged one; every rank calls it."""
        waits, forwards, memory, *loads = self._gather(device)
        self.waited += max(waits)
        new = {key: getattr(self, key) - self._since_log[key] for key in COUNTED}
        self._since_log = {key: getattr(self, key) for key in COUNTED}
        found: dict[str, float] = {
            **rates(new, self.work),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "step_seconds": round(new["seconds"] / max(new["steps"], 1), 4),
            "data_wait_seconds": round(max(waits), 4),
            "peak_memory_bytes": int(max(memory)),
            "elapsed_seconds": round(self.run.elapsed, 3),
        }
        if len(waits) > 1:
            own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
            found["slowest_rank"] = own.index(max(own))
            found["slowest_rank_lag_seconds"] = round(max(own) - statistics.median(own), 4)
        if self.ranks_a_node and len(waits) > self.ranks_a_node:
            for name, shares in zip(LOAD, loads, strict=True):
                for first in range(0, len(shares), self.ranks_a_node):
                    share = statistics.fmean(shares[first : first + self.ranks_a_node])
                    if not math.isnan(share):
                        found[f"node_{first // self.ranks_a_node}/{name}"] = round(share, 1)
        return found

    def _sum_passes(self, latest: int = 0) -> None:
        """Add up the timed forward passes on a GPU but for so many latest ones, which may still run."""
        done = len(self._events) - latest
        for start, end in self._events[:done]:
            end.synchronize()
            self._forward += start.elapsed_time(end) / 1000
        self._events = self._events[done:]

    def _gather(self, device: Any) -> list[tuple[float, ...]]:
        """By rank, since the last logged step: seconds of data waits and of forward passes, peak bytes, the load."""
        self._sum_passes()
        own = [self._waits, self._forward, float(peak_memory_bytes()), *load(device)]
        self._waits, self._forward = 0.0, 0.0
        if not dist.is_initialized():
            return [(value,) for value in own]
        here = torch.tensor(own, dtype=torch.float64, device=device)
        every = [torch.zeros_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(every, here)
        return list(zip(*(rank.tolist() for rank in every), strict=True))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        shorten_history(state)
        if not state.is_world_process_zero or "train_runtime" in logs:  # the closing summary is in run.json
            return
        row: dict[str, Any] = {"step": state.global_step, "epoch": logs.get("epoch")}
        row |= {key: value for key, value in logs.items() if key not in DROPPED}
        if "loss" in logs:
            row["rows_checksum"], self.rows_checksum = self.rows_checksum, 0
        self.run.log(row)


def rates(counted: dict[str, float], work: Work | None) -> dict[str, float]:
    """The metrics that follow from counts: tokens per second, padding, and where the work is known MFU and HFU."""
    tokens, seconds = counted["tokens"], counted["seconds"]
    if not seconds:  # resumed after the last step
        return {}
    found = {
        "tokens_per_second": round(tokens / seconds, 1),
        "trained_tokens_per_second": round(counted["trained_tokens"] / seconds, 1),
        "padding": round(1 - tokens / counted["places"], 4),
    }
    if work:
        shares = work.shares(int(tokens), int(counted["pairs"]), seconds)
        found["mfu"], found["hfu"] = (float(f"{share:.4g}") for share in shares)
    return found


def load(device: Any) -> tuple[float, ...]:
    """The use of this machine's processors and memory and of this rank's GPU, in percent; NaN where unknown."""
    gpu = gpu_memory = math.nan
    if torch.device(device).type == "cuda":
        with contextlib.suppress(Exception):  # it asks a library of the driver, which a container may lack
            gpu = float(torch.cuda.utilization(device))
        free, total = torch.cuda.mem_get_info(device)
        gpu_memory = 100 * (1 - free / total)
    return psutil.cpu_percent(), psutil.virtual_memory().percent, gpu, gpu_memory


def peak_memory_bytes() -> int:
    """The peak memory of this rank: the CUDA allocator's count, or the process's resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # On Apple's GPU, whose memory is the host's, PyTorch counts no peak: this is what it holds at the time of asking.
    held = torch.mps.driver_allocated_memory() if hardware.accelerator() == "mps" else 0
    return max(held, hardware.peak_resident_bytes())


def totals(telemetry: Telemetry, steps: int) -> dict[str, Any]:
    """The `totals` of run.json; every rank calls it, for its peak memory.

    Percentiles of step times, saves and the first step are of this start alone.
    """
    peaks = [peak_memory_bytes()]
    if dist.is_initialized():
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_memory_bytes())
    times, work = sorted(telemetry.step_seconds), telemetry.work
    counted = {key: getattr(telemetry, key) for key in COUNTED}
    return {
        "steps": steps,
        "tokens": telemetry.tokens,
        "trained_tokens": telemetry.trained_tokens,
        "seconds": round(telemetry.seconds, 3),
        "data_wait_seconds": round(telemetry.waited, 3),
        "goodput": round(telemetry.seconds / telemetry.run.elapsed, 4),
        "first_step_after_seconds": telemetry.first_step and round(telemetry.first_step, 3),
        "saves": len(telemetry.save_seconds),
        "save_seconds": round(sum(telemetry.save_seconds), 3),
        "tokens_per_second": None,
        **rates(counted, work),
        **({"peak_flops": work.peak, "peak_flops_source": work.peak_source} if work else {}),
        **{f"step_seconds_p{q}": round(times[len(times) * q // 100], 4) for q in (50, 90, 99) if times},
        "peak_memory_bytes": peaks,
        **({"reserved_memory_bytes": torch.cuda.max_memory_reserved()} if torch.cuda.is_available() else {}),
    }


def result_step(state: Any) -> int:
    """The step whose weights are the result: the best one where `load_best_model_at_end` has loaded it."""
    return int(state.best_global_step if state.best_model_checkpoint else state.global_step)


def final_losses(state: Any) -> dict[str, float]:
    """The last training and evaluation loss up to the step that is the result, from the trainer's state."""
    return _losses_until(state.log_history, result_step(state))


def _losses_until(history: list[dict[str, float]], step: int) -> dict[str, float]:
    last: dict[str, float] = {}
    for entry in history:
        if entry["step"] <= step:
            last |= {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
    return last


def shorten_history(state: Any) -> None:
    """Keep the last entries of the trainer's `log_history`, and of those before them what `final_losses` may need.

    Transformers keeps every entry in memory and writes all of them into each checkpoint: after a million steps two
    gigabytes on each rank, and half a gigabyte per checkpoint.
    """
    if len(state.log_history) < 2 * HISTORY:
        return
    older, kept = state.log_history[:-HISTORY], state.log_history[-HISTORY:]
    steps = sorted({min(state.best_global_step or 0, older[-1]["step"]), older[-1]["step"]})
    state.log_history = [{**_losses_until(older, step), "step": step} for step in steps] + kept
