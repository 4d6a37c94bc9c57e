"""Freed memory on a CPU without tcmalloc: glibc keeps it for the next step, and gives back now and then the rest.

Another allocator has neither call, and no need of them (allocator.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Any

from transformers import TrainerCallback

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
EVERY = 60.0  # seconds


def keep() -> None:
    """Let glibc keep freed blocks: by default every activation is mapped and unmapped anew.

    Those page faults took a third of a LoRA step of SmolLM2 on 2 cores (113 against 167 tokens/s).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


class GiveBack(TrainerCallback):
    """Returns to the system what nothing holds.

    Batches of ever other sizes leave holes that fit none of the next ones: within 90 steps recipes/lora.yaml grew to
    6.9 GiB on 2 cores, and to 6.0 with this, as fast (docs/benchmarks.md). What the next step needs goes too and comes
    back by page faults, a second's worth, so that it is done seldom.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._last < EVERY:
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._last = time.monotonic()
