"""Follow a run in the terminal, here or on a shared disk: its logged steps as they come, until it ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.files import open_file
from stepladder.manifest import METRICS, row_of, status

POLL = 1.0  # seconds
FOLLOW_ON = {"preempted": ": started again it goes on from its checkpoint, and the same --watch follows it on"}
QUIET = 600  # seconds without a line after which it is said that nothing comes


def follow(folder: Path) -> Iterator[str]:
    """Lines to print, one a logged step, until run.json says that the run has ended.

    A line of metrics.jsonl that is being written is waited for, a damaged one is named, and where the file
    is written anew (the run was resumed, and rewound to its checkpoint) the following goes on from there.
    """
    at, number, last, heard, quiet, inode = 0, 0, -1, time.monotonic(), False, 0
    while True:
        state, data = status(folder), b""  # before the reading: what comes last is read too
        with (
            contextlib.suppress(OSError, ValueError),
            open_file(folder / METRICS) as file,
        ):  # not there yet, or a share's hiccup
            facts = os.fstat(file.fileno())
            anew = at > 0 and (facts.st_size < at or facts.st_ino != inode)
            at, number, inode = (0, 0, facts.st_ino) if anew else (at, number, facts.st_ino)
            file.seek(at)
            data = file.read()
            if anew:
                yield "  the run was resumed from a checkpoint"
        whole = data[: data.rfind(b"\n") + 1]
        at += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            number += 1
            try:
                row = row_of(line)
                text = shown(row) if row else ""
            except OverflowError:  # a number of 400 digits
                row = None
            if not row:
                yield f"  {METRICS} line {number} is damaged: left out"
                continue
            if row["step"] > last or "eval_loss" in row:
                yield text
            last, heard, quiet = max(last, row["step"]), time.monotonic(), False
        if state not in ("running", "unreadable"):
            yield f"the run is {state}{FOLLOW_ON.get(state, '')}"
            return
        if not quiet and time.monotonic() - heard > QUIET:
            yield f"  nothing for {QUIET // 60} minutes: the run may have been killed before it could say so"
            quiet = True
        time.sleep(POLL)


def shown(row: dict[str, Any]) -> str:
    """One logged step, as the run itself shows it."""
    parts = [f"  step {row['step']:>5} "]
    for key, form in (("eval_loss", "held-out loss {:.4f}"), ("loss", "loss {:.4f}"), ("learning_rate", "lr {:.2g}"),
                      ("tokens_per_second", "{:,.0f} tok/s")):  # fmt: skip
        if isinstance(row.get(key), int | float):
            parts.append(form.format(row[key]))
    return "  ".join(parts)
