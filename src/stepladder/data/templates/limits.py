"""What a chat template may take: it is a program, and often a stranger's.

Jinja's sandbox keeps a template from files and from the interpreter, and `range` below 100,000. It does not end
nested loops, macros that call each other twice, or `{{ 'a' * 10**10 }}`, which it computes while it compiles.
"""

from __future__ import annotations

import math
import resource
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from stepladder.errors import ModelError

SECONDS = 5.0  # of processor time, for one conversation; a template in use takes less than a thousandth
MEMORY = 512 << 20  # bytes beyond what the process has
CHARACTERS = 10_000_000  # of a conversation's text, where that is more than `TIMES` the row's own
TIMES = 10
SOURCE = 1 << 20  # characters of the template itself
TICK = 0.25  # seconds between two looks at the clock


class Exceeded(ModelError):
    """The template takes more than it may; no other row would fare better, so none is skipped for it."""

    def __init__(self, what: str, **rest: Any):
        super().__init__(what, **{"help": "another one, such as chat_template: chatml", **rest})


class _Stop(BaseException):
    """Not an Exception: Jinja takes those for expressions that are no constants."""


class enforce:
    """Raise Exceeded where the block takes more than `SECONDS` or `MEMORY`.

    Time is limited in the main thread only, memory on Linux only. The limits are the process's own while the block
    runs: no other thread may need much memory meanwhile. 13 µs a block, so each rendering can have its own.
    """

    _began = math.inf  # processor time of the main thread at which the block that runs began

    def __enter__(self) -> None:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            if signal.getsignal(signal.SIGVTALRM) is not _look:
                signal.signal(signal.SIGVTALRM, _look)
            enforce._began = time.thread_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
        self._memory = resource.getrlimit(resource.RLIMIT_AS)
        if (held := _address_space()) is not None:
            soft, hard = self._memory
            most = held + MEMORY
            within = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(most, *within) if within else most, hard))

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_main:
            enforce._began = math.inf
        resource.setrlimit(resource.RLIMIT_AS, self._memory)
        if self._is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if isinstance(error, _Stop):
            raise Exceeded(f"the chat template takes more than {SECONDS:g} s for one conversation") from None
        if isinstance(error, MemoryError):
            raise Exceeded(
                f"the chat template takes more than {MEMORY >> 20} MiB of memory for one conversation"
            ) from None


def _look(number: int, frame: FrameType | None) -> None:
    # The timer counts the processor time of all threads, OpenMP's busy waiting included.
    if time.thread_time() - enforce._began > SECONDS:
        raise _Stop


def _address_space() -> int | None:
    """Bytes that the process has mapped; None where it cannot be told."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(64).split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None


def check_length(text: str, row: Any) -> None:
    """Raise Exceeded for a text that no row of this size should become."""
    if len(text) > CHARACTERS and len(text) > TIMES * len(str(row)):
        raise Exceeded(f"the chat template makes {len(text):,} characters of one conversation")
