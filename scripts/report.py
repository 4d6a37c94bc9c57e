"""Write one page on a run, or on several side by side: curves, verdicts, answers, recipe, data.

    python scripts/report.py runs/lora
    python scripts/report.py runs/lora runs/qlora -o compared.html
    python scripts/report.py runs/lora --project "Customer support"
    python scripts/report.py runs/lora --watch

The page is one self-contained file; without -o it is RUN/report.html. An unfinished, interrupted or
damaged run is shown as far as it can be read, and the page says what is wrong.
"""

import argparse
import json
from pathlib import Path

from stepladder import errors
from stepladder.reporting import curves, markdown, page, runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder; the first is the reference")
    parser.add_argument("-o", "--output", type=Path, help="the page (RUN/report.html; required for several runs)")
    parser.add_argument("--project", metavar="DOMAIN", help="also write RUN/mini_project_report.md, on this domain")
    parser.add_argument("--json", action="store_true", help="print the verdicts and differences as JSON")
    parser.add_argument("--watch", action="store_true", help="follow one run in the terminal until it ends")
    args = parser.parse_args()
    if args.watch:
        if len(args.runs) > 1:
            parser.error("--watch follows one run")
        runs.check_folder(args.runs[0])  # says what is wrong with the folder
        for line in runs.follow(args.runs[0]):
            print(line, flush=True)
        return
    if len(args.runs) > 1 and not args.output:
        parser.error("several runs need -o: the page belongs to none of their folders")

    first, *others = logged = runs.read_all(args.runs)
    differences = [_difference(first, other) for other in others]
    target = args.output or first.folder / "report.html"
    page.save(target, page.render_page(logged, differences))
    if args.project:
        for run in logged:
            page.save(run.folder / "mini_project_report.md", markdown.mini_project_report(run, args.project))
    if args.json:
        print(json.dumps({"page": str(target), "runs": [_facts(run) for run in logged], "differences": differences}))
        return
    if others:
        print("\n".join(runs.side_by_side(logged)))
    for run in logged:
        print(f"{run.name}: {', '.join(verdict.name for verdict in page.judge_run(run))}")
        for remark in run.remarks:
            print(f"  note: {remark}")
    print(f"✔ {target}")


def _difference(first: runs.LoggedRun, other: runs.LoggedRun) -> dict[str, str]:
    found = curves.between(first, other)
    return {
        "run": other.name,
        "steps compared": f"{found.steps:,}",
        "largest difference of the loss": f"{found.loss:.2g}",
        "mean": f"{found.loss_residual:+.1g}",
        "of the gradient norm, relative": f"{found.grad_norm:.2g}",
        "of the held-out loss": f"{found.eval_loss:.2g}",
        "the same curve (fp32)": "yes" if found.steps and found.within() else "no",
    }


def _facts(run: runs.LoggedRun) -> dict:
    found = [vars(verdict) for verdict in page.judge_run(run)]
    return {"folder": str(run.folder), "status": run.facts.get("status"), "verdicts": found, "remarks": run.remarks}


if __name__ == "__main__":
    errors.exit_with(main)
