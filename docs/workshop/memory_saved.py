"""Rank runs by the memory that they took, against the first: python docs/workshop/memory_saved.py runs/mem-*"""

import json
import sys
from pathlib import Path

BASELINE = "mem-baseline"

peaks = {}
for folder in map(Path, sys.argv[1:]):
    peaks[folder.name] = (
        max(json.loads((folder / "run.json").read_text(encoding="utf-8"))["totals"]["peak_memory_bytes"]) / 2**30
    )
print(f"{'strategy':<18} {'GiB':>6} {'saved':>6}")
for name, peak in sorted(peaks.items(), key=lambda item: item[1]):
    saved = round(1 - peak / peaks[BASELINE], 2) + 0  # no "-0%"
    print(f"{name:<18} {peak:6.2f} {saved:6.0%}")
