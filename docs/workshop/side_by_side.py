"""What inspect_model.py finds of several models, in one table: side_by_side.py MODEL [MODEL …]"""

import json
import subprocess
import sys

ROWS = ("base model", "task", "data set", "method", "size", "licence")

found = []
for model in sys.argv[1:]:
    words = [sys.executable, "scripts/inspect_model.py", model, "--json"]
    found.append(json.loads(subprocess.run(words, check=True, capture_output=True, encoding="utf-8").stdout))
print("|", " | ".join(["", *sys.argv[1:]]), "|")
print("| --- " * (len(found) + 1) + "|")
for row in ROWS:
    print("|", " | ".join([row, *(str(one[row]) for one in found)]), "|")
