"""Compare a base model with what was made of it: figures with intervals and tests, verdicts, answers side by side.

    python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/lora --data data/techco_eval.jsonl
    python scripts/compare.py --base kept.jsonl --tuned runs/lora --tuned runs/qlora --prompts questions.txt \\
        --output_dir runs/compared --rubric data/techco_rubric.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/compare.py …

--base takes a transcript of generate.py too. A server that speaks OpenAI's chat completions (--endpoint URL
--model NAME) takes the side that is not given. Writes evaluation_results.md, compare.json and report.html
into --output_dir (the first --tuned, where it is a run folder). See docs/evaluation.md.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from stepladder import console, errors, run
from stepladder.data import mixture
from stepladder.evaluation import compare, learned, questions, results, rubric, sides
from stepladder.evaluation.endpoint import Endpoint
from stepladder.reporting import page
from stepladder.training import ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", help="the model before: a folder, a hub id, or a transcript (.jsonl)")
    parser.add_argument("--tuned", action="append", default=[], help="a model after: a run folder, …; repeatable")
    parser.add_argument("--endpoint", metavar="URL", help="a server in place of a side, such as http://localhost:11434")
    parser.add_argument("--model", metavar="NAME", help="the server's model")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that the server has for an answer (60)")
    parser.add_argument("--data", help="held-out rows: JSONL, …")
    parser.add_argument("--prompts", type=Path, help="ask these in place of the data's questions: .txt or JSONL")
    parser.add_argument("--rubric", type=Path, help="style rules in YAML, such as data/techco_rubric.yaml")
    parser.add_argument("--general", default=mixture.GENERAL, type=Path, help="general knowledge, against forgetting")
    parser.add_argument("--limit", type=int, help="ask the first so many questions (all)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--output_dir", "--output-dir", type=Path)
    parser.add_argument("--show", type=int, default=3, help="how many answers to print (3)")
    parser.add_argument("--json", action="store_true", help="print compare.json")
    args = parser.parse_args()
    if bool(args.endpoint) != bool(args.model):
        parser.error("--endpoint and --model go together")
    if not (args.data or args.prompts):
        parser.error("--data FILE or --prompts FILE is needed")
    server = [Endpoint(args.endpoint, args.model, args.timeout)] if args.endpoint else []
    sources = [args.base, *args.tuned, *server] if args.base else [*server, *args.tuned]
    if len(sources) < 2:
        parser.error("two sides are needed: --base and --tuned, or one of them and --endpoint")
    is_run = bool(args.tuned) and (Path(args.tuned[0]) / run.MANIFEST).is_file()
    folder = args.output_dir or (Path(args.tuned[0]) if is_run else None)

    # What can be wrong with the files is found before torch is imported.
    rules = rubric.read(args.rubric) if args.rubric else []
    held_out = mixture.from_name(args.data) if args.data else None
    asked = questions.from_file(args.prompts) if args.prompts else questions.of_rows(held_out)
    on = sides.Measured(asked[: args.limit], held_out, notes=questions.remarks(asked))
    for source in sources:
        sides.check(source, on)
    if folder is None:
        parser.error("--output_dir is needed: the first --tuned is no run folder")
    run.make_folder(folder)
    rows = sides.training_rows(args.tuned[0], on.notes) if args.tuned else None
    on.training = sides.sample(rows) if rows else None
    on.general = sides.sample(mixture.from_name(str(args.general)), without=rows) if args.general.is_file() else None

    launch = ranks.launched()
    console.quiet_libraries()
    use_cpu = ranks.choose_device(launch)
    import accelerate

    console.quiet_progress_bars()
    ranks_here = accelerate.PartialState(cpu=use_cpu)  # the ranks meet
    template = sides.template_of(args.tuned)
    measured = []
    for source in sources:
        began = time.perf_counter()
        measured.append(sides.measure(source, on, args.max_new_tokens, template))
        if not args.json:
            console.say(f"{source}: {len(on.questions)} answers in {time.perf_counter() - began:.0f} s")
    if ranks_here.is_main_process:
        trained = learned.Trained(sides.answers_of(rows)) if rows else None
        facts = {
            "command": "python " + shlex.join(sys.argv),
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "held_out_rows": len(held_out or []),
            "notes": on.notes,
            **compare.compare(measured, on.questions, rules),
            "verdicts": compare.verdicts(measured, on.questions, trained),
        }
        files = {
            "compare.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
            "evaluation_results.md": results.markdown(facts),
            "report.html": page.of_comparison(folder, [Path(name) for name in args.tuned], facts),
        }
        for name, text in files.items():  # all are made before the first is written
            run.write_whole(folder / name, text)
        print(json.dumps(facts, ensure_ascii=False) if args.json else results.for_terminal(facts, args.show))
        if is_run and not args.json:
            print(results.of_run(json.loads((Path(args.tuned[0]) / run.MANIFEST).read_text())))
        if not args.json:
            print(f"everything lies in {folder}/: evaluation_results.md, compare.json, report.html")
    ranks_here.destroy_process_group()


if __name__ == "__main__":
    errors.exit_with(main)
