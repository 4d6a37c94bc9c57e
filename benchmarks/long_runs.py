"""What reading a long run takes: seconds and memory of each command on generated metrics of up to a million lines.

    python benchmarks/long_runs.py --page docs/report.md

Each command runs in a process of its own; its memory is the peak resident set of that process, imports included. Linux
counts a process's parent until it begins, so this one stays small.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVERY = 1000  # steps between two evaluations
ROW = (
    '{"step": %d, "epoch": %.6f, "loss": %.6f, "grad_norm": %.15f, "learning_rate": %.17g, "entropy": %.15f, '
    '"mean_token_accuracy": %.15f, "tokens_per_second": %.1f, "trained_tokens_per_second": %.1f, "padding": 0.1234, '
    '"mfu": 0.4321, "hfu": 0.4321, "tokens": %d, "trained_tokens": %d, "step_seconds": 0.6123, '
    '"data_wait_seconds": 0.0001, "peak_memory_bytes": 2254857830, "elapsed_seconds": %.3f, "rows_checksum": %d}\n'
)
EVALUATION = '{"step": %d, "epoch": %.6f, "eval_loss": %.6f, "eval_runtime": 1.0, "eval_samples_per_second": 3.0}\n'
RESUME = """
import sys
from pathlib import Path
from stepladder.run import Run
record = Run(Path(sys.argv[1]), is_writer=True)
record.manifest = {"status": "failed", "global_batch_size": 8, "datasets": [{"sha256": ""}]}
record.begin("", {"step": int(sys.argv[2]), "from": ""}, world_size=1, strategy="single", **record.manifest)
"""
CARD = "import sys; from pathlib import Path; from stepladder.model import card; card.read_training(Path(sys.argv[1]))"


def write_run(folder: Path, steps: int, seed: int = 0) -> None:
    """A run folder as `sft.py` writes it, with a loss that falls and is noisy; one logged line per step."""
    folder.mkdir(parents=True)
    facts = {"status": "finished", "recipe": {"max_steps": steps}, "totals": {"steps": steps}, "packages": {},
             "parameters": {"all": 1, "trainable": 1}, "datasets": [], "git_commit": "", "precision": "fp32",
             "global_batch_size": 8, "strategy": "single", "world_size": 1}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    drawn = random.Random(seed).random
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            noise, norm, entropy, accuracy = drawn(), drawn(), drawn(), drawn()
            epoch, loss = step / 5000, 1.5 + 2 * 0.5 ** (10 * step / steps) + 0.2 * noise
            speed, rate = 800 + 40 * noise, 5e-4 * (1 - step / steps)
            out.write(ROW % (step, epoch, loss, 1 + norm, rate, entropy, accuracy, speed, speed / 2,
                             500 * step, 250 * step, 0.6 * step, 7919 * step))  # fmt: skip
            if step % EVERY == 0:
                out.write(EVALUATION % (step, epoch, loss + 0.1))


def measure(*words: object) -> tuple[float, float]:
    """Seconds and MiB of a command of Python."""
    began = time.perf_counter()
    process = os.posix_spawn(
        sys.executable, [sys.executable, *map(str, words)], {**os.environ, "PYTHONPATH": str(ROOT / "src")},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )  # fmt: skip
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"✘ {' '.join(map(str, words))} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--page", type=Path, help="the page whose <!-- long-runs --> table is replaced")
    args = parser.parse_args()
    os.chdir(ROOT)
    lines = ["| logged steps | metrics | `report.py RUN` | page | two runs | `--watch` | model card | resumed start |",
             "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    print("\n".join(lines))
    for steps in args.steps:
        with tempfile.TemporaryDirectory() as work:
            run, other = Path(work) / "run", Path(work) / "other"
            write_run(run, steps)
            write_run(other, steps, seed=1)
            cells = [f"{steps:,}", f"{(run / 'metrics.jsonl').stat().st_size / 2**20:,.1f} MiB"]
            for words in (
                ("scripts/report.py", run),
                ("scripts/report.py", run, other, "-o", other / "both.html"),
                ("scripts/report.py", run, "--watch"),
                ("-c", CARD, run),
                ("-c", RESUME, run, steps // 2),
            ):
                cells.append("{:.1f} s, {:.0f} MiB".format(*measure(*words)))
            cells.insert(3, f"{(run / 'report.html').stat().st_size / 1024:,.0f} KiB")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    versions = f"Python {platform.python_version()}, NumPy {importlib.metadata.version('numpy')}"
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    table = "\n".join([f"`python benchmarks/long_runs.py`, {datetime.date.today()}, {cores}, {versions}:", "", *lines])
    if args.page:
        mark = r"(?s)(<!-- long-runs -->\n).*(<!-- /long-runs -->)"
        args.page.write_text(re.sub(mark, rf"\g<1>{table}\n\g<2>", args.page.read_text()))


if __name__ == "__main__":
    main()
