"""Train two steps with each optimizer under each strategy by each method: none may end in a traceback.

    python tests/every_optimizer.py                                            # about an hour
    python tests/every_optimizer.py --optimizers lion_8bit sgd --strategies fsdp --methods lora

A cell that cannot train is to be refused by name. The runs of a strategy share one `accelerate launch`; each saves a
checkpoint, which reads the optimizer's state. Optimizers whose package is not installed are refused for that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import same_curve
from stepladder.recipe.schema import known_keys
from tiny import make_tiny

STRATEGIES = {"single": 1, "ddp": 2, "zero2": 2, "zero3": 2, "zero3_offload": 2, "fsdp": 2, "fsdp_offload": 2}


def outcome(log: Path) -> str:
    """`trained`, `refused: …` by Stepladder's message, or `broken: …` with the last line of any rank."""
    said = "\n".join(file.read_text() for file in sorted(log.parent.glob(f"{log.name}*")) if file.suffix != ".failed")
    if same_curve.finished(log.with_suffix("")):
        return "trained"
    refused = [line for line in said.splitlines() if line.startswith("✘ ")]
    if refused and "Traceback" not in said:
        return f"refused: {refused[0][2:]}"
    causes = [line for line in said.splitlines() if "Error" in line]
    return f"broken: {(causes or said.splitlines() or ['nothing was said'])[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    optimizers = known_keys()["optim"].choices
    for name, choices in (("optimizers", optimizers), ("strategies", STRATEGIES), ("methods", same_curve.METHODS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    args = parser.parse_args()
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model, data = make_tiny(folder / "tiny"), same_curve.write_rows(folder / "rows.jsonl")
        for strategy in args.strategies:
            logs = []
            jobs = []
            for method in args.methods:
                for optimizer in args.optimizers:
                    run = folder / f"{strategy}-{method}-{optimizer}"
                    keys = same_curve.recipe_keys(method, model, data, steps=2)
                    keys |= {"optim": optimizer, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
                    keys |= {"use_cpu": True}
                    if "galore" in optimizer or "apollo" in optimizer:
                        keys["optim_target_modules"] = "all-linear"
                    run.with_suffix(".recipe").write_text(json.dumps(keys))
                    argv = ["--recipe", str(run.with_suffix(".recipe")), "--output_dir", str(run)]
                    logs.append(run.with_suffix(".log"))
                    jobs.append({"argv": argv, "port": same_curve.free_port(), "log": str(logs[-1])})
            same_curve.launch_many(strategy, STRATEGIES[strategy], jobs, folder / f"{strategy}.json")
            for log in logs:
                found = outcome(log)
                ended[found.split(":")[0]] += 1
                print(f"{log.stem:50} {found[:150]}", flush=True)
    print(", ".join(f"{count} {name}" for name, count in ended.items()))
    return 1 if ended["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
