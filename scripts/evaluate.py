"""Run lm-eval for one or several models: public benchmarks, or a task made from a data file.

    python scripts/evaluate.py --model runs/lora --tasks data/techco_eval.jsonl
    python scripts/evaluate.py --model models/smollm2-135m-instruct --model runs/lora --tasks arc_easy

Public tasks need a hub. A data file does not: each of its questions comes with four answers to choose
from. Needs lm-eval: pip install -c constraints.txt -e ".[eval]". See docs/evaluation.md.
"""

import json
import tempfile
from pathlib import Path

from stepladder import console, errors, flags
from stepladder.data import mixture
from stepladder.evaluation import harness
from stepladder.model import start


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--model", action="append", required=True, help="a folder or a hub id; repeatable")
    parser.add_argument("--base", help="for adapters: the path of their base (default: the one that they name)")
    parser.add_argument("--tasks", nargs="+", required=True, help="task names of lm-eval, or data files")
    parser.add_argument("--limit", type=flags.count, help="only the first N questions of each task")
    parser.add_argument("--batch_size", "--batch-size", type=flags.count, default=8)
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=flags.TRUST)
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    args = parser.parse_args()
    for names in (args.model, args.tasks):
        if twice := next((name for name in names if names.count(name) > 1), None):
            parser.error(f"{twice} is given twice")
    rows = {name: mixture.from_name(name) for name in args.tasks if harness.is_data(name)}
    bases = {name: args.base if start.resolve_model(name).adapter else None for name in args.model}
    if args.base and not any(bases.values()):
        parser.error("--base is for adapters, and no --model is one")
    for name, base in bases.items():
        start.resolve_existing_model(name, base)

    console.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        tasks = [harness.local_task(rows[name], Path(folder)) if name in rows else name for name in args.tasks]
        harness.check_names(tasks)
        found = {
            name: harness.evaluate(name, tasks, args.limit, args.batch_size, base, args.trust_remote_code)
            for name, base in bases.items()
        }
    if args.json:
        print(json.dumps({name: [score._asdict() for score in scores] for name, scores in found.items()}))
        return
    _print(found)


def _print(found: dict[str, list[harness.Score]]) -> None:
    from rich.table import Table

    from stepladder.screen import Screen

    table = Table("task", "metric", *found)
    for scores in zip(*found.values(), strict=True):
        cells = [f"{s.value:.3f}" + (f" ± {s.error:.3f}" if s.error is not None else "") for s in scores]
        table.add_row(scores[0].task, scores[0].metric, *cells)
    Screen(plain=140).print(table)
    print("± one standard error")


if __name__ == "__main__":
    errors.exit_with(main)
