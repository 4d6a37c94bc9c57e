"""audit.json: what the trained rows are like as text, kept in the run folder for the page and the mini-project."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from stepladder.data import audit
from stepladder.data.audit import printout
from stepladder.data.rows import Rows
from stepladder.files import write_whole

MOST = 10_000  # rows that are looked at: seconds; check.py --audit looks at all of them
ANY_LENGTH = audit.Limits(0, 0)  # what was trained on is not called too short afterwards


def write(folder: Path, train: Any, evaluation: Any) -> None:
    """Audit what was trained and evaluated on, as far as it is held in memory; a stream is not."""
    if not isinstance(train, Rows):
        return
    held_out = _some(evaluation) if isinstance(evaluation, Rows) else None
    findings = audit.check(_some(train), ANY_LENGTH, held_out)
    if len(train) > MOST:
        looked = {"rows looked at": MOST, "of": len(train)}
        findings.insert(0, audit.Finding(audit.FIGURE, "sampled", "a sample drawn by chance", figures=looked))
    found = printout.as_json(audit.Audit(train.name, train, held_out, findings), [])
    write_whole(folder / "audit.json", json.dumps(found, ensure_ascii=False) + "\n")


def _some(rows: Rows) -> Rows:
    return rows.take(sorted(random.Random(42).sample(range(len(rows)), MOST))) if len(rows) > MOST else rows
