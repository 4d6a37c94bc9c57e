"""What each run of a comparison learned and forgot: python docs/workshop/forgotten.py runs/forgetting/compare.json"""

import json
import sys
from pathlib import Path

facts = json.loads(Path(sys.argv[1]).read_text())
base, *others = facts["sides"]
behaviours = [row for row in facts["metrics"] if "noise" in row]
together = next(row for row in behaviours if row["name"] == "all behaviours")
head = f"{'run':<20} {'held-out loss':>14} {'general knowledge':>18} {'change':>7}"
print(f"{head} {'behaviours':>11} {'passes':>7}  lost")
for number, side in enumerate((base, *others)):
    change = side["general_loss"] - base["general_loss"]
    claims = [claim["met"] for claim in facts["required"] if claim["side"] == side["name"]]
    passes = ("yes" if all(claims) else "no") if claims else "–"
    lost = [row["name"] for row in behaviours if number and row["tests"][number]["verdict"] == "worse"]
    losses = f"{side['loss']:14.3f} {side['general_loss']:18.3f} {change:+7.3f}"
    share = together["sides"][number]["mean"]
    print(f"{Path(side['name']).name[:20]:<20} {losses} {share:11.0%} {passes:>7}  {', '.join(lost)}".rstrip())
