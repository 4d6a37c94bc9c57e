"""Signals that ask a run to end: remembered here, answered at a step's end by all ranks together.

Handlers do no more than set a flag: whatever else they did would run in the middle of a step, on
one rank alone. They stand from the first moment, so that a signal during start-up counts too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

ASKING = ("SIGTERM", "SIGUSR1", "SIGINT")
# A terminal sends Ctrl-C to the launcher and to the ranks, and the launcher passes it on: the
# second SIGINT is a person's only where some time lies between.
ANOTHER_AFTER = 1.5  # seconds

asked: str | None = None  # the first signal's name
_first_interrupt = 0.0
_launcher: int | None = None


def stop_asked() -> bool:
    """Whether a signal came, or the launcher is gone: torchrun dies of SIGUSR1 and leaves its ranks running."""
    return asked is not None or (_launcher is not None and os.getppid() != _launcher)


def install(trains: bool = False) -> None:
    """Call it first thing, and with `trains` when all ranks are about to train.

    Before that, several ranks keep SIGTERM's own meaning: nothing is trained yet that a save could
    keep, and by it the launcher ends those that wait for a rank which has refused its input. A
    handler would hold them there until they are killed 30 s later.
    """
    global _launcher
    if "TORCHELASTIC_RUN_ID" in os.environ and not trains:
        _launcher = os.getppid()
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    for name in ASKING:
        if name == "SIGTERM" and several and not trains:
            continue
        with contextlib.suppress(AttributeError):  # Windows knows no SIGUSR1
            signal.signal(getattr(signal, name), _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    global asked, _first_interrupt
    name = signal.Signals(number).name
    now = time.monotonic()
    if name == "SIGINT":
        if _first_interrupt and now - _first_interrupt > ANOTHER_AFTER:
            os._exit(130)
        _first_interrupt = _first_interrupt or now
    if asked is None:
        asked = name
        # os.write: print is not safe in a handler
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"\n{name}: the run saves a checkpoint at the end of this step and stops\n".encode())
