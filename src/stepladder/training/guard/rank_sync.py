"""Once a step the ranks tell each other what one of them may have seen: a signal, a loss that is no number.

One small all-reduce before each optimizer step, and before each batch of an evaluation. What follows from it is
done by all ranks at the same step: a rank that stops or skips alone leaves the others waiting in a collective
(Transformers' `enable_jit_checkpoint` does, and hangs or breaks the run).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from stepladder.console import say
from stepladder.errors import TrainingError
from stepladder.training.guard import signals

SKIPS = 10  # steps that `on_nan: skip` leaves out before it gives up


class EvaluationLeftError(Exception):
    """A stop was asked for while the run was evaluated."""


class Agreement(TrainerCallback):
    """Stops on a signal after a checkpoint, and before an optimizer step that would ruin the weights."""

    def __init__(self, trainer: Any, on_nan: str):
        self.trainer, self.on_nan = trainer, on_nan
        self.preempted = False
        self.skipped: list[int] = []  # steps
        self._save_after_evaluation = False

    def stop_asked(self) -> bool:
        """Whether any rank was asked to stop; every rank calls it."""
        asked = torch.tensor(signals.stop_asked(), dtype=torch.int64, device=self.trainer.args.device)
        if dist.is_initialized():
            dist.all_reduce(asked)
        return bool(asked)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows, (bad_loss, bad_gradient) = self.trainer.rows, self.trainer.not_finite()
        seen = torch.tensor(
            [signals.stop_asked(), bad_loss, bad_gradient, rows.checksum(), *rows.counts.tolist()],
            dtype=torch.int64,
            device=args.device,
        )
        if dist.is_initialized():
            dist.all_reduce(seen)
        asked, losses, gradients, *counted = seen.tolist()
        self.trainer.meter.count(*counted)
        self.preempted |= bool(asked)
        if losses or gradients:
            self._not_finite("loss" if losses else "gradient norm", bool(gradients), state.global_step + 1)
        rows.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self.preempted = False  # there is nothing left to stop
        if self.preempted:
            control.should_save = control.should_training_stop = True
        # A checkpoint comes after the evaluation at an epoch's end: a run resumed in between would lack it.
        last = control.should_training_stop and not self.preempted
        if control.should_save and args.eval_strategy == "epoch" and (last or float(state.epoch).is_integer()):
            control.should_save, self._save_after_evaluation = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.preempted and not float(state.epoch).is_integer():  # no end of an epoch, but of this start
            control.should_log = control.should_evaluate = control.should_save = False
        if self._save_after_evaluation:
            control.should_save, self._save_after_evaluation = True, False

    def _not_finite(self, what: str, bad_gradient: bool, step: int) -> None:
        rows = sorted(set(self.trainer.rows.gather_numbers()))
        place = f"the {what} of step {step} is not a finite number"
        named = f"its rows (counted from 0): {rows}"
        # DeepSpeed steps in the backward pass, and leaves out by itself a step whose gradient is no number
        left_out = bad_gradient or not self.trainer.is_deepspeed_enabled
        if self.on_nan == "skip" and left_out and len(self.skipped) < SKIPS:
            self.skipped.append(step)
            self.trainer.leave_out_step()
            self.trainer.meter.run.update(skipped_steps=self.skipped)
            say(f"⚠ {place}, and the step is left out; {named}")
            return
        more = f", after {SKIPS} that were left out" if self.on_nan == "skip" else ""
        raise TrainingError(
            f"{place}{more}",
            why=named,
            help="look at those rows; a lower learning_rate; bf16 instead of fp16; or on_nan: skip",
        )
