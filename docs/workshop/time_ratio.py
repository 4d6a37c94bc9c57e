"""How much longer one run trained than another, without start-up: time_ratio.py runs/steps60 runs/steps120"""

import json
import sys
from pathlib import Path

short, long = (json.loads((Path(name) / "run.json").read_text(encoding="utf-8"))["totals"] for name in sys.argv[1:])
print(
    f"time without start-up: {long['seconds']:.0f} s against {short['seconds']:.0f} s, "
    f"{long['seconds'] / short['seconds']:.2f} times for {long['steps'] / short['steps']:.2f} times the steps"
)
