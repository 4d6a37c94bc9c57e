"""Follow a run in the terminal, here or on a shared disk: its logged steps as they come, until it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.run import METRICS, status

POLL = 1.0  # seconds
QUIET = 600  # seconds without a line after which it is said that nothing comes


def follow(folder: Path) -> Iterator[str]:
    """Lines to print, one a logged step, until run.json says that the run has ended.

    A line of metrics.jsonl that is being written is waited for, a damaged one is named, and where the file
    is written anew (the run was resumed, and rewound to its checkpoint) the following goes on from there.
    """
    at, number, last, heard, quiet = 0, 0, -1, time.monotonic(), False
    while True:
        ended = status(folder) not in ("running", "unreadable")  # before the reading: what comes last is read too
        data = (folder / METRICS).read_bytes() if (folder / METRICS).is_file() else b""
        if len(data) < at:
            yield "  the run was resumed from a checkpoint"
            at = number = 0
        whole = data[at : data.rfind(b"\n") + 1]
        at += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            number += 1
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, TypeError, KeyError):
                yield f"  {METRICS} line {number} is damaged: left out"
                continue
            if step > last or "eval_loss" in row:
                yield shown(row)
            last, heard, quiet = max(last, step), time.monotonic(), False
        if ended:
            yield f"the run is {status(folder)}"
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
