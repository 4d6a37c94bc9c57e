"""How the answers of a transcript end, and how much they repeat.

python docs/workshop/answers.py runs/before.jsonl
"""

import json
import sys
from pathlib import Path

from stepladder.evaluation.metrics import LENGTH, REPETITION, score_answer
from stepladder.evaluation.questions import Answer

for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    question, answer = (message["content"] for message in row["messages"][-2:])
    found = score_answer(Answer(answer, row["stopped"]), reference="")
    end = "stops by itself" if row["stopped"] else "is cut off"
    print(f"{question}  {found[LENGTH]:.0f} words, {found[REPETITION]:.0%} of its runs of four repeat, {end}")
