"""What ends a run early: a stop signal or a NaN loss, which all ranks act on together, a hang, or a lack of memory.

The ranks share what one of them may have seen by one small all-reduce before each optimizer step, and before each batch
of an evaluation, and act at the same step: a rank that stops or skips alone leaves the others waiting in a collective
(Transformers' `enable_jit_checkpoint` does, and hangs or breaks the run).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from stepladder import errors, installation
from stepladder.console import say
from stepladder.errors import TrainingError, first_line
from stepladder.run import Run
from stepladder.settings import Settings
from stepladder.training.guard import signals
from stepladder.training.launch.launcher import Launch
from stepladder.training.watch.telemetry import peak_memory_bytes

SKIPS = 10  # steps that `on_nan: skip` skips before it gives up


class EvaluationLeftError(Exception):
    """A stop was requested during an evaluation."""


class RankSync(TrainerCallback):
    """Stops on a signal or at a step, after a checkpoint, and before an optimizer step that would ruin the weights."""

    def __init__(self, trainer: Any, on_nan: str, stop_at: int | None = None):
        self.trainer, self.on_nan, self.stop_at = trainer, on_nan, stop_at
        self.preempted = self.reached_stop = False
        self.skipped: list[int] = []  # steps
        self._save_after_evaluation = self._save_is_written = False

    def stop_asked(self) -> bool:
        """Whether any rank has received a stop signal; every rank calls it, between two batches of an evaluation."""
        stops, writing = self.sum_over_ranks(signals.stop_asked(), self.trainer.writes)
        if not writing:
            self.trainer.finish_save()
        return bool(stops)

    def sum_over_ranks(self, *values: int) -> list[int]:
        """Integers summed over all ranks."""
        sums = torch.tensor(values, dtype=torch.int64, device=self.trainer.args.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums.tolist()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows, (bad_loss, bad_gradient) = self.trainer.rows, self.trainer.not_finite()
        stops, writing, losses, gradients, *counts = self.sum_over_ranks(
            signals.stop_asked(), self.trainer.writes, bad_loss, bad_gradient, rows.checksum(), *rows.counts.tolist()
        )
        self._save_is_written = not writing
        self.trainer.meter.count(*counts)
        self.preempted |= bool(stops)
        if losses or gradients:
            self._handle_nan("loss" if losses else "gradient norm", bool(gradients), state.global_step + 1)
        rows.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._save_is_written:  # all ranks have seen it in this step
            self.trainer.finish_save()
        if state.global_step >= state.max_steps:
            self.preempted = False  # no step is left to stop before
            if self.stop_at is not None:  # only now known where the recipe counts epochs
                say(f"note: step {state.global_step} is the run's last, so --stop_at_step {self.stop_at} has no effect")
        elif self.stop_at is not None and state.global_step >= self.stop_at:
            self.preempted = self.reached_stop = True
            # At an epoch's end an evaluation by epochs comes by itself.
            by_epoch = args.eval_strategy == "epoch" and float(state.epoch).is_integer()
            control.should_evaluate |= args.eval_strategy != "no" and not by_epoch
        if self.preempted:
            control.should_save = control.should_training_stop = True
        # At an epoch's end the checkpoint comes after the evaluation, which a run resumed from before it would lack.
        last = control.should_training_stop and not self.preempted
        if control.should_save and args.eval_strategy == "epoch" and (last or float(state.epoch).is_integer()):
            control.should_save, self._save_after_evaluation = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.preempted and not float(state.epoch).is_integer():  # the end of this start, not of an epoch
            control.should_log = control.should_evaluate = control.should_save = False
        if self._save_after_evaluation:
            control.should_save, self._save_after_evaluation = True, False

    def _handle_nan(self, what: str, bad_gradient: bool, step: int) -> None:
        rows = sorted(set(self.trainer.rows.gather_numbers()))
        place = f"the {what} of step {step} is not a finite number"
        row_list = f"its rows (counted from 0): {rows}"
        # DeepSpeed steps in the backward pass, and skips a step with a NaN gradient by itself
        can_skip = bad_gradient or not self.trainer.is_deepspeed_enabled
        if self.on_nan == "skip" and can_skip and len(self.skipped) < SKIPS:
            self.skipped.append(step)
            self.trainer.skip_step()
            self.trainer.meter.run.update(skipped_steps=self.skipped)
            say(f"⚠ {place}, and the step is left out; {row_list}")
            return
        self.trainer.finish_save()  # a start after the end resumes from it
        more = f", after {SKIPS} that were left out" if self.on_nan == "skip" else ""
        raise TrainingError(
            f"{place}{more}",
            why=row_list,
            help="look at those rows; a lower learning_rate; bf16 instead of fp16; or on_nan: skip",
        )


class Watchdog(TrainerCallback):
    """Dumps the Python stacks of this rank and exits with 1 after `limit` seconds without progress.

    Progress is a micro-batch, an evaluated batch, or a chunk of a checkpoint that the run waits for. The time counts
    from the first step: preparing data, or skipping a resumed stream, may take longer. Each rank watches itself; the
    others wait in a collective and reach the limit with it. It comes before torch's own limit (`ddp_timeout`, 1800 s),
    which names no line.
    """

    def __init__(self, run: Run, limit: float, rank: int):
        self.run, self.limit, self.rank = run, limit, rank
        self.waits_for = ""  # beside the step, for the message
        self._moved, self._step = 0.0, 0
        self._ended = threading.Event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.move()
        if not self._step:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        self._step = state.global_step + 1

    def move(self, *args: Any, **kwargs: Any) -> None:
        self._moved = time.monotonic()

    on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_log = move

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.limit / 10)):
            if time.monotonic() - self._moved > self.limit:
                self._end()

    def _end(self) -> None:
        file = self.run.folder / f"hang-rank-{self.rank}.txt"
        with file.open("w", encoding="utf-8") as out:
            faulthandler.dump_traceback(out, all_threads=True)
        fault = TrainingError(
            f"[rank {self.rank}] nothing has moved for {self.limit:g} s {self.waits_for or f'in step {self._step}'}",
            why=f"where it stands: {file}",
            help="compare the files of all ranks: the one that waits in no collective is the cause",
        )
        print(fault.render(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        errors.tell_launcher(fault.what, fault.render())
        self.run.update(status="failed", error=fault.what)
        os._exit(errors.EXIT_FAILED)


@contextlib.contextmanager
def explain_out_of_memory(recipe: Settings, launch: Launch, micro: int, planned: int | None = None) -> Iterator[None]:
    """Turn a failed allocation in the block, on GPU or CPU, into one message.

    Args:
        micro: the micro-batch size.
        planned: the peak memory by the plan, in bytes.

    Raises:
        TrainingError: with this rank's peak, and what would need less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_cpu = "can't allocate memory" in str(error)  # torch raises a plain RuntimeError
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        plan = f"; the plan said that it needs {planned / 2**30:.2f}" if planned else ""
        raise TrainingError(
            f"out of memory on rank {launch.rank}, which held {peak_memory_bytes() / 2**30:.2f} GiB at most{plan}",
            why=first_line(error),
            help="\n".join(memory_savings(recipe, launch, micro)),
            this_rank_only=True,
        ) from None


def memory_savings(recipe: Settings, launch: Launch, micro: int) -> list[str]:
    """Changes that need less memory and keep the curve, the cheapest first."""
    savings = []
    if micro > 1:
        half = f"--per_device_train_batch_size {micro // 2}"
        if recipe.get("global_batch_size"):
            savings.append(
                f"{half} (the accumulation follows: the global batch stays {recipe.get('global_batch_size')})"
            )
        else:
            savings.append(f"{half} --gradient_accumulation_steps {2 * recipe.get('gradient_accumulation_steps')}")
    if not recipe.get("gradient_checkpointing"):
        savings.append("--gradient_checkpointing true (about a quarter slower)")
    if not launch.strategy.shards_weights:
        more = "" if launch.ranks > 1 else " on several devices"
        savings.append(f"{installation.launch_command('zero3')} …{more}: weights are sharded too")
    elif launch.strategy.is_hsdp:
        savings.append(f"accelerate_configs/fsdp.yaml: weights are sharded over all {launch.ranks} ranks")
    elif not launch.strategy.offloads:
        savings.append(f"accelerate_configs/{launch.strategy}_offload.yaml: the shards lie in host memory")
    return savings[:3] or ["a smaller model, a shorter max_length, or more devices"]
