"""What each run of a comparison learned and forgot: python docs/workshop/forgotten.py runs/forgetting/compare.json"""

import json
import sys
from pathlib import Path

facts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
base, *others = facts["sides"]
print(f"{'run':<20} {'held-out loss':>14} {'general knowledge':>18} {'change':>7}")
for side in (base, *others):
    change = side["general_loss"] - base["general_loss"]
    print(f"{Path(side['name']).name[:20]:<20} {side['loss']:14.3f} {side['general_loss']:18.3f} {change:+7.3f}")
