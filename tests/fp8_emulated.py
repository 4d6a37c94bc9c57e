"""Runs of many_runs.py in fp8 on a CPU, where torchao emulates the products: `tests/fp8_emulated.py JOBS.json`"""

from __future__ import annotations

import functools

import many_runs
import torchao.float8

from stepladder.model import fp8


def start(job: dict, rank: int) -> None:
    """A run of many_runs.py in its forked process, past the checks of the device; does not return."""
    config = torchao.float8.Float8LinearConfig
    torchao.float8.Float8LinearConfig = functools.partial(config, emulate=True)
    fp8.check_device = fp8.check_planned = lambda *_: None
    many_runs.run(job, rank)


if __name__ == "__main__":
    many_runs.main(start)
