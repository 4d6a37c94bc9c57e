"""What each run of a comparison can still do, and whether it passes: python docs/workshop/lost.py compare.json"""

import json
import sys
from pathlib import Path

MARKS = {"better": "▲", "worse": "▼"}

facts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
names = [side["name"] for side in facts["sides"]]
print(f"{'behaviour':<20} {'noise':>6}" + "".join(f"{Path(name).name[:20]:>22}" for name in names))
for row in (row for row in facts["metrics"] if "noise" in row):
    tests = [MARKS.get(test["verdict"], " ") if test else " " for test in row["tests"]]
    cells = [f"{side['mean']:.0%} {mark}" for side, mark in zip(row["sides"], tests, strict=True)]
    print(f"{row['name']:<20} {row['noise']:6.0%}" + "".join(f"{cell:>22}" for cell in cells).rstrip())
for claim in dict.fromkeys(one["claim"] for one in facts["required"]):
    met = {one["side"]: one["met"] for one in facts["required"] if one["claim"] == claim}
    marks = ["" if name not in met else "✔ " if met[name] else "✘ " for name in names]
    print(f"{claim:<27}" + "".join(f"{mark:>22}" for mark in marks).rstrip())
