"""Run the code that models wrote against assertions: passes.py runs/code/compare.json data/workshop/code_tests.jsonl

Each answer runs in a process of its own, without the environment, for five seconds at most. That keeps out
accidents, not malice: run it where nothing can be lost.
"""

import json
import subprocess
import sys
from pathlib import Path


def passes(code: str, tests: list[str]) -> bool:
    code = code.split("```")[1].removeprefix("python") if "```" in code else code
    program = "\n".join([code, *tests])
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], env={}, capture_output=True, timeout=5)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


sides = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["sides"]
cases = [json.loads(line) for line in Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()]
for side in sides:
    count = sum(passes(text, case["tests"]) for text, case in zip(side["answers"], cases, strict=False))
    print(f"{side['name']}: {count} of {len(side['answers'])} functions pass their tests")
