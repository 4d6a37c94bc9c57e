"""What loading the model adds to each rank's own memory, in real runs of scripts/sft.py; several in one launch.

    accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 tests/measure_load.py JOBS.json

JOBS.json is as for many_runs.py; each rank leaves `LOG.RANK.loaded`: bytes that no file backs (RssAnon).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import many_runs


def own_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run(job: dict, rank: int) -> None:
    from stepladder.training.launch import ranks

    load = ranks.load_base_model

    def measured(*args: Any) -> Any:
        before = own_bytes()
        model = load(*args)
        Path(f"{job['log']}.{rank}.loaded").write_text(json.dumps(own_bytes() - before))
        return model

    ranks.load_base_model = measured
    many_runs.run(job, rank)


if __name__ == "__main__":
    many_runs.main(run)
