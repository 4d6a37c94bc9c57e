"""The cost of reliability: how long saves block training, and the time from the command to the first step.

    python benchmarks/survive.py --report docs/reliability.md

SmolLM2-135M on TechCo's rows by the shipped recipe, with a save every four steps: 12 steps, then 12 more after
resuming, in one process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RECIPES = {"lora": "lora", "full": "sft"}
STEPS, SAVE_STEPS = 12, 4


def totals(method: str, folder: Path, steps: int) -> dict[str, Any]:
    """The totals of a run that is started or resumed up to `steps`, with the bytes of a checkpoint."""
    words = f"""--recipe {RECIPES[method]} --output_dir {folder} --max_steps {steps} --eval_strategy no
        --lr_scheduler_type constant --save_strategy steps --save_steps {SAVE_STEPS}""".split()
    done = subprocess.run([sys.executable, "scripts/sft.py", *words], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if done.returncode:
        sys.exit(f"✘ {done.args}\n{done.stdout[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())["totals"]
    files = json.loads((folder / f"checkpoint-{steps}/COMPLETE.json").read_text())["files"]
    return found | {"bytes": sum(file["bytes"] for file in files.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="the page whose <!-- cost --> table is replaced")
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as work:
        for method in RECIPES:
            begun, resumed = (totals(method, Path(work) / method, steps) for steps in (STEPS, 2 * STEPS))
            save = (begun["save_seconds"] + resumed["save_seconds"]) / (begun["saves"] + resumed["saves"])
            first = [f"{part['first_step_after_seconds']:.1f} s" for part in (begun, resumed)]
            share = 100 * save / resumed["step_seconds_p50"]
            cells = (method, f"{begun['bytes'] / 1e6:,.0f} MB", f"{save:.2f} s, {share:.0f} % of a step", *first,
                     f"{100 * resumed['goodput']:.0f} %")  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    table = "\n".join(
        (
            f"`python benchmarks/survive.py`, {datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), "
            f"torch {torch.__version__.split('+')[0]}; SmolLM2-135M, {STEPS} steps, then resumed for "
            f"{STEPS} more; a save every {SAVE_STEPS} steps.",
            "",
            "| method | checkpoint | time of a save | time to first step | when resumed | goodput of both starts |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
        )
    )
    if args.report:
        page = args.report.read_text()
        args.report.write_text(re.sub(r"(?s)(<!-- cost -->\n).*(<!-- /cost -->)", rf"\g<1>{table}\g<2>", page))


if __name__ == "__main__":
    main()
