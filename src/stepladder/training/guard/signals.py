"""Signals that ask a run to end: recorded here, handled at a step's end by all ranks together.

A handler only sets a flag: anything else would run in the middle of a step, on one rank alone. Handlers are
installed first of all, so that a signal during start-up counts too.

SIGHUP (a closed terminal or ssh session) is handled like SIGTERM, unless it was ignored at the start (nohup).

SIGUSR1 is blocked and polled instead: a queue sends it to every process of a job, and would kill a compiler
or a worker that a rank has started. Child processes inherit the block.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

USR1: signal.Signals | None = getattr(signal, "SIGUSR1", None)  # Windows has none
HUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
# A terminal sends Ctrl-C to the launcher and to the ranks, and the launcher passes it on: the
# second SIGINT is a person's only where some time lies between.
ANOTHER_AFTER = 1.5  # seconds

asked: str | None = None  # the first signal's name
_first_interrupt = 0.0
_launcher: int | None = None


def stop_asked() -> bool:
    """Whether a signal came, or the launcher is gone: torchrun dies of SIGUSR1 and leaves its ranks running."""
    if sys.platform != "win32" and signal.SIGUSR1 in signal.sigpending():
        _say(signal.SIGUSR1.name)
    return asked is not None or (_launcher is not None and os.getppid() != _launcher)


def install(trains: bool = False) -> None:
    """Call it first thing, and again with `trains` when all ranks are about to train.

    Before that, several ranks keep the default action of SIGTERM: there is nothing to save yet, and the launcher
    ends with it the ranks that wait for one which has failed. With a handler they would wait until they are killed
    30 s later.
    """
    global _launcher
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if launched and not trains:
        _launcher = os.getppid()
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.signal(signal.SIGINT, _remember)
    answered = trains or (os.environ.get("WORLD_SIZE") or "1") == "1"
    if answered:
        signal.signal(signal.SIGTERM, _remember)
    # torchrun catches SIGHUP under nohup too, and ends its ranks with it: they run in a session of their own, so no
    # terminal sends them another one.
    if HUP and (launched or signal.getsignal(HUP) != signal.SIG_IGN):
        signal.signal(HUP, _remember if answered else signal.SIG_DFL)


def _remember(number: int, frame: FrameType | None) -> None:
    global _first_interrupt
    now = time.monotonic()
    if number == signal.SIGINT:
        if _first_interrupt and now - _first_interrupt > ANOTHER_AFTER:
            os._exit(130)
        _first_interrupt = _first_interrupt or now
    _say(signal.Signals(number).name)


def _say(name: str) -> None:
    global asked
    if asked is None:
        asked = name
        # os.write: print is not safe in a handler
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: the run ends this step (or evaluation batch), saves, and stops\n".encode())
