"""Compare a base model with tuned ones: metrics with intervals and tests, verdicts, answers side by side.

    python scripts/compare.py --tuned runs/lora
    python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/lora --data data/techco_eval.jsonl
    python scripts/compare.py --base kept.jsonl --tuned runs/lora --tuned runs/qlora --prompts questions.txt \\
        --output_dir runs/compared --rubric data/techco_rubric.yaml
    python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/lora --data data/techco_eval.jsonl \\
        --require "better, not memorized, did not forget"
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/compare.py …

Without --data the rows are those that the run held out; without --base the base is the run's. Rows that one of the
models was trained on are left out. --base also accepts a transcript of generate.py. A server with OpenAI's chat
completions API (--endpoint URL --model NAME) takes the missing side, or is one more. Writes evaluation_results.md,
compare.json and report.html into --output_dir (default: the first --tuned, if it is a run folder), and a compare.json
into each other run folder. Exits with 3 if a claim of --require does not hold for a --tuned. See docs/evaluation.md.
"""

from stepladder import errors, flags
from stepladder.data import mixture
from stepladder.evaluation import behaviours, generation, sides


def main() -> int | None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--base", help="the base: a folder, a hub id or a transcript (.jsonl) (default: the run's)")
    parser.add_argument("--tuned", action="append", default=[], help="a tuned model: a run folder, …; repeatable")
    parser.add_argument("--endpoint", metavar="URL", help="a server instead of a model, as http://localhost:11434")
    parser.add_argument("--model", metavar="NAME", help="name of the server's model")
    parser.add_argument("--timeout", type=flags.seconds, default=60, help="seconds per answer of a server (60)")
    parser.add_argument("--data", help="held-out rows: JSONL, … (default: the run's)")
    parser.add_argument("--prompts", type=flags.path, help="questions instead of the data's: .txt or JSONL")
    parser.add_argument("--rubric", type=flags.path, help="style rules in YAML, such as data/techco_rubric.yaml")
    parser.add_argument("--general", metavar="FILE", help=f"general knowledge, to test forgetting ({mixture.GENERAL})")
    parser.add_argument("--behaviours", action="store_true",
                        help=f"ask what else the base can do, to test forgetting ({behaviours.SUITE})")  # fmt: skip
    parser.add_argument("--require", action="append", default=[], metavar="CLAIMS",
                        help='exit with 3 unless all hold: "better, did not forget, chrF not worse"')  # fmt: skip
    parser.add_argument("--limit", type=flags.count, help="ask only the first N questions (all)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=flags.count,
                        help=f"length limit of an answer (a transcript's, or {generation.MAX_NEW_TOKENS})")  # fmt: skip
    parser.add_argument("--output_dir", "--output-dir", type=flags.path)
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=flags.TRUST)
    parser.add_argument("--show", type=flags.integer, default=3, help="how many answers to print (3)")
    parser.add_argument("--json", action="store_true", help="print compare.json")
    return sides.run_comparison(parser.parse_args(), parser.error)


if __name__ == "__main__":
    errors.exit_with(main)
