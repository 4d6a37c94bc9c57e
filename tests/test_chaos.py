"""A slice of `make chaos`: eight faults, a seed that has shown several kinds of them."""

from __future__ import annotations

import sys

import pytest

from conftest import ROOT, run

pytestmark = [pytest.mark.proof, pytest.mark.alone]


def test_eight_faults_leave_no_trace_in_the_curve(tiny) -> None:
    """Guards the promise as a whole, in one process and on two ranks: whatever struck, the same rows and losses."""
    words = ("--runs", 8, "--seed", 1, "--model", tiny, "--strategies", "single", "ddp")
    done = run(sys.executable, ROOT / "tests/chaos.py", *words)
    assert done.code == 0, done
    assert "differ from the uninterrupted run's** | 0 |" in done.out
