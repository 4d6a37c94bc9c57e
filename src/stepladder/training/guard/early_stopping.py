"""Early stopping: a run ends after so many evaluations in a row without an improvement of the metric.

Transformers' EarlyStoppingCallback decides, but by itself it counts on each rank alone, forgets its count over a
resume (unless `restore_callback_states_from_checkpoint` is set), and saves no checkpoint of the step that it ends at.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import EarlyStoppingCallback

from stepladder.console import say


class EarlyStopping:
    """Counts the evaluations in a row without an improvement, and ends the run when they reach the patience.

    Args:
        patience: that number of evaluations; None counts nothing.
        threshold: by how much the metric must be better than the best one so far.
    """

    def __init__(self, trainer: Any, patience: int | None, threshold: float):
        self.trainer, self.patience = trainer, patience
        self._rule = EarlyStoppingCallback(patience or 1, threshold)

    @property
    def count(self) -> int:
        """Evaluations without an improvement since the last one with it; a checkpoint holds it."""
        return self._rule.early_stopping_patience_counter

    @count.setter
    def count(self, value: int) -> None:
        self._rule.early_stopping_patience_counter = value

    @property
    def metric(self) -> str:
        return f"eval_{str(self.trainer.args.metric_for_best_model).removeprefix('eval_')}"

    @property
    def ends_run(self) -> bool:
        """Whether the run ends at this step, before its last one."""
        state = self.trainer.state
        return self.patience is not None and self.count >= self.patience and state.global_step < state.max_steps

    def add(self, metrics: dict[str, float]) -> None:
        """Count an evaluation; every rank calls it before the best metric so far takes the new value.

        All ranks take the first one's count: they would wait for each other for ever if one of them ended alone.
        """
        if self.patience is None or self.metric not in metrics:
            return
        trainer, value = self.trainer, metrics[self.metric]
        self._rule.check_metric_value(trainer.args, trainer.state, trainer.control, value)
        self.count = trainer.rank_sync.sum_over_ranks(self.count if trainer.args.process_index == 0 else 0)[0]
        if not self.ends_run:
            return
        # What ends the run here is neither a signal nor `--stop_at_step`: started again, it would have nothing to do.
        trainer.rank_sync.preempted = trainer.rank_sync.reached_stop = False
        trainer.control.should_training_stop = True
        trainer.control.should_save |= trainer.args.save_strategy == "steps"  # as at the last step
        times = f"{self.count} evaluation{'s' * (self.count != 1)} in a row"
        say(f"  step {trainer.state.global_step:>5}   early stopping: no improvement in {times}")

    def manifest_entry(self) -> dict[str, Any]:
        """Where and why the run ended, as run.json holds it; empty where it ended at its last step."""
        if not self.ends_run:
            return {}

        def finite(value: float | None) -> float | None:
            return float(value) if value is not None and math.isfinite(value) else None

        state, name = self.trainer.state, self.metric
        rows = [(row["step"], row[name]) for row in self.trainer.meter.run.rows() if name in row]
        entry = {
            "step": state.global_step,
            "of_steps": state.max_steps,
            "metric": name,
            "value": next((finite(value) for step, value in reversed(rows) if step == state.global_step), None),
            "best": finite(state.best_metric),
            "best_step": next((step for step, value in rows if value == state.best_metric), None),
            "evaluations": self.count,
            "patience": self.patience,
            "threshold": self._rule.early_stopping_threshold,
        }
        return {"stopped_early": entry}
