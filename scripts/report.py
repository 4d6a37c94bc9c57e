"""Write one page on a run, or on several side by side: curves, verdicts, answers, recipe, data.

    python scripts/report.py runs/lora
    python scripts/report.py runs/lora runs/qlora -o compared.html
    python scripts/report.py runs/lora --project "Customer support"
    python scripts/report.py runs/lora --watch
    python scripts/report.py --sweep slurm/sweeps/lora_rank.yaml

The page is one self-contained file; without -o it is RUN/report.html. An unfinished, interrupted or
damaged run is shown as far as it can be read, and the page says what is wrong. Of several runs, the best
by held-out loss is named, with its interval, and which others cannot be distinguished from it.
"""

import json

from stepladder import errors, flags
from stepladder.cluster.sweep import read_sweep
from stepladder.evaluation.choice import choose_run
from stepladder.reporting import curves, markdown, page, runs


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument(
        "runs", nargs="*", type=flags.path, metavar="RUN", help="a run folder; the first is the reference"
    )
    parser.add_argument("--sweep", type=flags.path, metavar="FILE", help="the runs of a sweep, in place of RUN")
    parser.add_argument("-o", "--output", type=flags.path, help="the page (RUN/report.html; required for several runs)")
    parser.add_argument("--project", metavar="DOMAIN", help="also write RUN/mini_project_report.md, on this domain")
    parser.add_argument("--json", action="store_true", help="print the verdicts and differences as JSON")
    parser.add_argument("--watch", action="store_true", help="follow one run in the terminal until it ends")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.sweep):
        parser.error("runs, or --sweep with its file")
    if args.watch:
        if args.sweep or len(args.runs) > 1:
            parser.error("--watch follows one run")
        runs.check_folder(args.runs[0])  # says what is wrong with the folder
        for line in runs.follow(args.runs[0]):
            print(line, flush=True)
        return
    if len(args.runs) > 1 and not args.output:
        parser.error("several runs need -o: the page belongs to none of their folders")

    folders, absent = read_sweep(args.sweep).split_folders() if args.sweep else (args.runs, [])
    first, *others = logged = runs.read_all(folders)
    differences = [curves.describe_difference(first, other) for other in others]
    choice = choose_run(logged)
    target = args.output or (first.folder.parent if args.sweep else first.folder) / "report.html"
    page.save(target, page.render_page(logged, differences, choice))
    if args.project:
        for run in logged:
            page.save(run.folder / "mini_project_report.md", markdown.mini_project_report(run, args.project))
    if args.json:
        found = {"runs": [_facts(run) for run in logged], "differences": differences, "choice": choice and vars(choice)}
        print(json.dumps({"page": str(target), **found, "absent": [str(folder) for folder in absent]}))
        return
    if others:
        print("\n".join(runs.side_by_side(logged)))
    for run in logged:
        print(f"{run.name}: {', '.join(verdict.name for verdict in page.judge_run(run))}")
        for remark in run.remarks:
            print(f"  note: {remark}")
    for folder in absent:
        print(f"  note: {folder} holds no run: it never began")
    if choice:
        print(f"{choice.name}: {choice.what}\n  {choice.evidence}")
    print(f"✔ {target}")


def _facts(run: runs.LoggedRun) -> dict:
    found = [vars(verdict) for verdict in page.judge_run(run)]
    return {"folder": str(run.folder), "status": run.facts.get("status"), "verdicts": found, "remarks": run.remarks}


if __name__ == "__main__":
    errors.exit_with(main)
