"""A callback of one's own: python scripts/sft.py --recipe lora --callback docs/prometheus.py

Metrics for Prometheus' textfile collector; node_exporter's --collector.textfile.directory is the run folder.
"""

import contextlib
import re
from pathlib import Path

from transformers import TrainerCallback

from stepladder.files import write_whole


class Callback(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # an evaluation, or the closing summary
            return
        logs["tokens_a_step"] = logs["tokens_per_second"] * logs["step_seconds"]  # a metric of one's own
        if state.is_world_process_zero:
            figures = {re.sub(r"\W", "_", key): value for key, value in {**logs, "step": state.global_step}.items()}
            lines = [f"stepladder_{key} {value}\n" for key, value in figures.items() if isinstance(value, int | float)]
            with contextlib.suppress(OSError):  # a full disk: the next step tries again
                write_whole(Path(args.output_dir) / "metrics.prom", "".join(lines))
