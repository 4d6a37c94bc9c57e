"""Compare a base model with what was made of it: figures with intervals and tests, verdicts, answers side by side.

    python scripts/compare.py --tuned runs/lora
    python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/lora --data data/techco_eval.jsonl
    python scripts/compare.py --base kept.jsonl --tuned runs/lora --tuned runs/qlora --prompts questions.txt \\
        --output_dir runs/compared --rubric data/techco_rubric.yaml
    python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/lora --data data/techco_eval.jsonl \\
        --require "better, not memorized, did not forget"
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/compare.py …

Without --data the rows are those that the run held out, without --base its base. Rows that a side was trained on
are left out. --base takes a transcript of generate.py too. A server that speaks OpenAI's chat completions
(--endpoint URL --model NAME) takes the side that is not given. Writes evaluation_results.md, compare.json and
report.html into --output_dir (the first --tuned, where it is a run folder), and each other run's own compare.json
into its folder. Exits with 3 where what --require asks for does not hold of each --tuned. See docs/evaluation.md.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from stepladder import console, errors, flags
from stepladder.data import mixture
from stepladder.evaluation import behaviours, compare, endpoint, gate, generate, held_out, learned, questions, results

from stepladder.evaluation import rubric, sides  # isort: skip
from stepladder.evaluation.endpoint import Endpoint
from stepladder.files import make_folder, write_whole
from stepladder.manifest import MANIFEST
from stepladder.reporting import page
from stepladder.training.launch import launcher, ranks


def main() -> int | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", help="the model before: a folder, a hub id, a transcript (.jsonl) (the run's)")
    parser.add_argument("--tuned", action="append", default=[], help="a model after: a run folder, …; repeatable")
    parser.add_argument("--endpoint", metavar="URL", help="a server in place of a side, such as http://localhost:11434")
    parser.add_argument("--model", metavar="NAME", help="the server's model")
    parser.add_argument("--timeout", type=flags.seconds, default=60, help="seconds that a server has to answer (60)")
    parser.add_argument("--data", help="held-out rows: JSONL, … (those that the run held out)")
    parser.add_argument("--prompts", type=Path, help="ask these in place of the data's questions: .txt or JSONL")
    parser.add_argument("--rubric", type=Path, help="style rules in YAML, such as data/techco_rubric.yaml")
    parser.add_argument("--general", metavar="FILE", help=f"general knowledge, against forgetting ({mixture.GENERAL})")
    parser.add_argument("--behaviours", action="store_true",
                        help=f"ask what the base can do besides, against forgetting ({behaviours.SUITE})")  # fmt: skip
    parser.add_argument("--require", action="append", default=[], metavar="CLAIMS",
                        help='exit with 3 unless they hold: "better, did not forget, chrF not worse"')  # fmt: skip
    parser.add_argument("--limit", type=flags.count, help="ask the first so many questions (all)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=flags.count,
                        help=f"of an answer (a transcript's, or {generate.MAX_NEW_TOKENS})")  # fmt: skip
    parser.add_argument("--output_dir", "--output-dir", type=flags.folder)
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=flags.TRUST)
    parser.add_argument("--show", type=flags.whole, default=3, help="how many answers to print (3)")
    parser.add_argument("--json", action="store_true", help="print compare.json")
    args = parser.parse_args()
    if bool(args.endpoint) != bool(args.model):
        parser.error("--endpoint and --model go together")
    notes: list[str] = []
    runs = held_out.Runs(notes)
    if not (args.data or args.prompts or (args.tuned and runs.of(args.tuned[0]))):
        parser.error("--data FILE or --prompts FILE is needed: the first --tuned is no run, which holds rows out")
    if args.tuned and not (args.base or args.endpoint):
        args.base = runs.base_of(args.tuned[0])
    server = [Endpoint(args.endpoint, args.model, args.timeout)] if args.endpoint else []
    sources = [args.base, *args.tuned, *server] if args.base else [*server, *args.tuned]
    if len(sources) < 2:
        parser.error("two sides are needed: --base and --tuned, or one of them and --endpoint")
    sides_named = [os.path.normpath(source) if isinstance(source, str) else source for source in sources]
    if twice := next((name for name in sides_named if sides_named.count(name) > 1), None):
        parser.error(f"{twice} is named twice: a comparison needs different sides")
    folder = args.output_dir or next((Path(name) for name in args.tuned[:1] if is_run(name)), None)

    # What can be wrong with the files is found before torch is imported.
    rules = rubric.read(args.rubric) if args.rubric else []
    required = gate.read(args.require, rules)
    trained = {str(name): keys for name in sources if isinstance(name, str) and (keys := runs.trained(name))}
    compared, on_training, given = None, False, 0
    if args.data or not args.prompts:
        compared = mixture.from_name(args.data) if args.data else runs.held_out(args.tuned[0])
        notes += compared.notes
        compared = held_out.once(compared, notes)
        given = len(compared)
        compared, on_training = held_out.apart(compared, trained, notes)
        if on_training and args.prompts:
            raise errors.DataError("each row of --data was trained on", help="other rows, or --prompts alone")
    asked = questions.from_file(args.prompts, notes) if args.prompts else questions.of_rows(compared)
    asked = held_out.prompts_apart(held_out.prompts_once(asked, notes), trained, notes) if args.prompts else asked
    notes += questions.remarks(asked, None if args.prompts else compared)
    asked = asked[: args.limit]
    on = sides.Measured(asked, compared, notes=notes, base=sources[0])
    on.suite = behaviours.read() if args.behaviours or gate.asks_behaviours(required) else []
    wants_general = args.general or mixture.GENERAL.is_file()
    general = mixture.from_name(str(args.general or mixture.GENERAL)) if wants_general else None
    for source in sources:
        sides.check(source, on)
    length = sides.length(sources, args.max_new_tokens, on.notes)
    if folder is None:
        parser.error("--output_dir is needed: the first --tuned is no run folder")
    make_folder(folder)
    rows = {str(name): found for name in sources[1:] if (found := sides.training_rows(name, runs))}
    on.notes += [] if on_training else held_out.asked_before(asked, rows)
    on.training = {name: drawn for name, found in rows.items() if (drawn := sides.sample(found))}
    on.general = sides.sample(general, without=set().union(*trained.values())) if general else None
    on.notes += sides.not_measured(sources, on)

    kept = endpoint.Kept(folder / "server_answers.jsonl", server[0], length) if server else None
    if kept and kept.known:
        on.notes.append(f"{len(kept.known)} answers of {server[0]} were kept by a comparison that failed")

    launch = launcher.launched()
    console.quiet_libraries()
    with console.quick_imports():
        use_cpu = ranks.choose_device(launch)
        import accelerate

    console.quiet_progress_bars()
    ranks_here = accelerate.PartialState(cpu=use_cpu)  # the ranks meet
    template = sides.template_of(args.tuned, args.trust_remote_code)
    sides_of = {}
    for source in sorted(sources, key=lambda source: source not in server):  # what fails by others' fault comes first
        began = time.perf_counter()
        sides_of[source] = sides.measure(source, on, length, template, kept, args.trust_remote_code)
        if not args.json:
            tried = sides_of[source].tried
            suite = f" and {sum(one is not None for one in tried.kept)} of behaviours" if tried else ""
            console.say(f"{source}: {len(on.questions)} answers{suite} in {time.perf_counter() - began:.0f} s")
    measured = [sides_of[source] for source in sources]
    if ranks_here.is_main_process:
        answers = {name: learned.Trained(sides.answers_of(found)) for name, found in rows.items()}
        facts = {
            "command": "python " + console.quoted(*sys.argv),
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "held_out_rows": 0 if on_training else len(compared or []),
            "training_rows": len(compared or []) if on_training else 0,
            "left_out_rows": given - len(compared or []),
            "max_new_tokens": length,
            "notes": on.notes,
        }

        def found(some: list[compare.Side]) -> dict:
            told = facts | compare.whole(some, on.questions, rules, answers, on_training)
            return told | ({"required": gate.judge(required, told)} if required else {})

        told = found(measured)
        files = {
            folder / "compare.json": as_text(told),
            folder / "evaluation_results.md": results.markdown(told),
            folder / "report.html": page.of_comparison(folder, [Path(name) for name in args.tuned], told),
        }
        # Each other run is left its own comparison with the base: its page and its mini-project are made from it.
        own = [side for side in measured[1:] if is_run(side.name) and Path(side.name).resolve() != folder.resolve()]
        own = [side for side in own if os.access(side.name, os.W_OK)]
        files |= {Path(side.name) / "compare.json": as_text(found([measured[0], side])) for side in own}
        for file, text in files.items():  # all are made before the first is written
            write_whole(file, text)
        if kept:
            kept.remove()
        if args.json:
            print(json.dumps(told, ensure_ascii=False, allow_nan=False))
        else:
            print(results.for_terminal(told, args.show))
            if args.tuned and is_run(args.tuned[0]):
                print(results.of_run(page.read(Path(args.tuned[0])).facts))
            print(f"everything lies in {folder}/: evaluation_results.md, compare.json, report.html")
            for side in own:
                print(f"{side.name}'s own comparison with the base is kept in {side.name}/compare.json")
            print(*gate.lines(told["required"]) if required else [], sep="\n", end="\n" * bool(required))
        if not all(claim["met"] for claim in told.get("required", [])):
            return errors.EXIT_UNMET
    return None


def is_run(name: str) -> bool:
    return (Path(name) / MANIFEST).is_file()


def as_text(facts: dict) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    errors.exit_with(main)
