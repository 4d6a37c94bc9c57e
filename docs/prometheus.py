"""An example callback: python scripts/sft.py --recipe lora --callback docs/prometheus.py

It writes metrics for Prometheus' textfile collector: --collector.textfile.directory of node_exporter is the run folder.
"""

import contextlib
import re
from pathlib import Path

from transformers import TrainerCallback

from stepladder.files import write_atomic


class Callback(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # an evaluation, or the final summary
            return
        logs["tokens_per_step"] = logs["tokens_per_second"] * logs["step_seconds"]  # an additional metric
        if state.is_world_process_zero:
            values = {re.sub(r"\W", "_", key): value for key, value in {**logs, "step": state.global_step}.items()}
            lines = [f"stepladder_{key} {value}\n" for key, value in values.items() if isinstance(value, int | float)]
            with contextlib.suppress(OSError):  # a full disk: the next step tries again
                write_atomic(Path(args.output_dir) / "metrics.prom", "".join(lines))
