"""Compare a base model with a tuned one: held-out loss, and answers side by side.

python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/lora --data data/techco_eval.jsonl

Where the tuned one is a run folder, the answers are kept in its compare.json and shown in its report.html.
"""

import argparse
import json
import time
from pathlib import Path

from stepladder import console, errors, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", required=True, help="the model before: a folder or a hub id")
    parser.add_argument("--tuned", required=True, help="the model after: a run folder, an adapter, a merged model")
    parser.add_argument("--data", required=True, help="held-out rows: JSONL")
    parser.add_argument("--show", type=int, default=3, help="how many answers to print (3)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()

    console.quiet_libraries()
    from stepladder.data import mixture
    from stepladder.evaluation import compare
    from stepladder.model import load
    from stepladder.reporting import page

    console.quiet_progress_bars()
    rows, sides = mixture.from_name(args.data), []
    for name in (args.base, args.tuned):
        began = time.perf_counter()
        model, tokenizer = load.for_inference(name)
        sides.append(compare.measure(name, model, tokenizer, rows, args.show, args.max_new_tokens))
        if not args.json:
            print(
                f"{name}: {len(rows)} rows and {args.show} answers in {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    manifest = Path(args.tuned) / "run.json"
    if manifest.is_file():  # the run's page shows the answers too
        run.write_whole(manifest.with_name("compare.json"), compare.as_json(args.data, rows, sides))
        page.write(manifest.parent)
    if args.json:
        print(
            json.dumps(
                {side.name: {"loss": side.loss, "answers": side.answers} for side in sides},
                ensure_ascii=False,
            )
        )
        return
    print(compare.side_by_side(rows, sides))
    before, after = sides
    print(f"held-out loss ({before.tokens:,} answer tokens): {before.loss:.3f} before, {after.loss:.3f} after")
    if manifest.is_file():
        facts = json.loads(manifest.read_text())
        counts, totals = facts["parameters"], facts["totals"]
        print(f"parameters: {counts['trainable']:,} trainable of {counts['all']:,}")
        print(f"training: {totals['steps']} steps, {totals['tokens']:,} tokens, {totals['seconds']:.0f} s")
        print(f"everything lies in {args.tuned}/: report.html, run.json, metrics.jsonl, recipe.yaml, the result")


if __name__ == "__main__":
    errors.exit_with(main)
