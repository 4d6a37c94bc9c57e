"""What real runs of scripts/sft.py hold at most, as PyTorch counts it; several in one launch.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 tests/measure_memory.py JOBS.json

JOBS.json is as for many_runs.py; each rank leaves `LOG.RANK.peak`: the most bytes of tensors that
were alive at once from the second optimizer step on (the first creates the optimizer's state).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import many_runs


def main() -> None:
    many_runs.main(run)


def run(job: dict, rank: int) -> None:
    from stepladder.planning.live_bytes import LiveBytes
    from stepladder.training.watch import telemetry

    class Peak(LiveBytes):
        peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if self.now > self.peak:
                self.measure_again()
            self.peak = max(self.peak, self.now)
            return out

    live = Peak()

    class Probe(telemetry.Telemetry):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            live.__enter__()  # sft.py has a model by now, and no Trainer: what it made before would take long to count

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_end(args, state, control, **kwargs)
            live.__exit__(None, None, None)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            for tensor in known(kwargs["model"], kwargs["optimizer"]):
                live.add(tensor)
            if state.global_step == 1:
                live.measure_again()
                live.peak = live.now

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            Path(f"{job['log']}.{rank}.peak").write_text(json.dumps(live.peak))

    telemetry.Telemetry = Probe  # type: ignore[misc]
    many_runs.run(job, rank)


def known(model: Any, optimizer: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


if __name__ == "__main__":
    main()
