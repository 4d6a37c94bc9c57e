"""What each rank holds from the load of the model to the first step, in real runs of scripts/sft.py; several a launch.

    accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 tests/measure_load.py JOBS.json

JOBS.json is as for many_runs.py; a job with `"stop": true` ends at its first step, and of one with `"one_reader": true`
another rank than 0 fails where it opens weights. Each rank leaves `LOG.RANK.loaded`: times, and the bytes that no file
backs (RssAnon) beyond those before the load.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import many_runs

INTERVAL = 0.005  # seconds between two looks


def own_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run(job: dict, rank: int) -> None:
    from stepladder.training.launch import weight_sending
    from stepladder.training.watch import telemetry

    load, samples, ended = weight_sending.load_base_model, [], threading.Event()

    def sample(before: int) -> None:
        while not ended.wait(INTERVAL):
            samples.append((time.time(), own_bytes() - before))

    def measured(*args: Any) -> Any:
        threading.Thread(target=sample, args=(own_bytes(),), daemon=True).start()
        return load(*args)

    class Probe(telemetry.Telemetry):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            if not ended.is_set():
                time.sleep(2 * INTERVAL)
                ended.set()
                Path(f"{job['log']}.{rank}.loaded").write_text(json.dumps(samples))
                if job.get("stop"):
                    import torch.distributed as dist

                    dist.barrier()
                    os._exit(0)

    if job.get("one_reader") and rank:
        import transformers.modeling_utils

        transformers.modeling_utils.safe_open = None
    weight_sending.load_base_model = measured
    telemetry.Telemetry = Probe  # type: ignore[misc]
    many_runs.run(job, rank)


def peaks(log: str | Path, ranks: int) -> tuple[int, list[int]]:
    """The most bytes that all ranks held at one time, and the most of each."""
    found = [json.loads(Path(f"{log}.{rank}.loaded").read_text()) for rank in range(ranks)]
    now, most = [0] * ranks, 0
    for _, rank, held in sorted((at, rank, held) for rank, samples in enumerate(found) for at, held in samples):
        now[rank] = held
        most = max(most, sum(now))
    return most, [max(held for _, held in samples) for samples in found]


if __name__ == "__main__":
    many_runs.main(run)
