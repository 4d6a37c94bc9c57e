"""What measuring costs: the time of one step's telemetry, against that of a step.

    python benchmarks/telemetry.py --run runs/demo
    python -m torch.distributed.run --nproc_per_node 2 -- benchmarks/telemetry.py --run runs/demo

It counts, times and logs steps of two micro-batches of 4 × 512 tokens without training anything: in one process, or
on several ranks over gloo, which gather their figures at each step.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import TrainerControl

from stepladder import run
from stepladder.model.flops import Flops
from stepladder.training import batches
from stepladder.training.watch import telemetry

STEPS, MICRO_BATCHES = 500, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run folder: what a step takes is read from it")
    args = parser.parse_args()
    first = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    work = telemetry.Work(Flops(10**8, 10**6, 10**5), False, 1e12, "")
    device, history = torch.device("cpu"), list[dict]()
    state = SimpleNamespace(global_step=1, is_world_process_zero=first, log_history=history)
    of_cpu, logged = SimpleNamespace(device=device), TrainerControl(should_log=True)
    ids = torch.ones(4, 512, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids, "rows": torch.arange(4)[:, None]}
    with tempfile.TemporaryDirectory() as folder:
        meter, seen = telemetry.Telemetry(run.Run(Path(folder), is_writer=first), work), batches.StepRows()
        began = time.perf_counter()
        for _ in range(STEPS):
            for inputs in meter.batches(iter([dict(batch) for _ in range(MICRO_BATCHES)])):
                seen.add(inputs)
                with meter.forward(device):
                    pass
            meter.count(seen.checksum(), *seen.counts.tolist())
            seen.clear()
            meter.on_step_end(of_cpu, state, logged)
            meter.on_log(None, state, None, {"loss": 1.0, **meter.step_metrics(device)})
        cost = (time.perf_counter() - began) / STEPS
    if not first:
        return
    step = json.loads((args.run / "run.json").read_text())["totals"]["step_seconds_p50"]
    print(f"{cost * 1e6:,.0f} µs a step, {100 * cost / step:.3f} % of the {step:.3f} s of a step of {args.run}")


if __name__ == "__main__":
    main()
