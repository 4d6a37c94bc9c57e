"""Ask a model: a base, a run folder, an adapter or a merged model. Answers are printed as they are generated.

    python scripts/generate.py --model runs/lora --prompt "How do I track my order?"
    python scripts/generate.py --model runs/lora --chat --system "You are TechCo's support."
    python scripts/generate.py --model models/smollm2-135m-instruct --prompts questions.txt --transcript kept.jsonl

A transcript can be a side of a comparison: compare.py --base kept.jsonl --tuned runs/lora --prompts questions.txt
An existing transcript is kept unless --overwrite is given.
"""

from stepladder import console, errors, flags
from stepladder.evaluation import generation
from stepladder.evaluation.questions import Message


def main() -> None:
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--base", help="for an adapter: the path of its base (default: the one that it names)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a question; may be given several times")
    what.add_argument(
        "--prompts", type=flags.path, metavar="FILE", help="questions: one per line (.txt), or JSONL rows"
    )
    what.add_argument("--chat", action="store_true", help="a conversation; /reset restarts it")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--transcript", type=flags.path, metavar="FILE", help="save questions and answers as JSONL")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing transcript")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=flags.count, default=generation.MAX_NEW_TOKENS)
    parser.add_argument(
        "--temperature", type=flags.temperature, default=0.0, help="above 0: sampling; 0: greedy (default)"
    )
    parser.add_argument("--top_p", "--top-p", type=flags.fraction, help="with --temperature")
    parser.add_argument("--top_k", "--top-k", type=flags.count, help="with --temperature")
    parser.add_argument("--repetition_penalty", "--repetition-penalty", type=flags.above_0)
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=flags.TRUST)
    parser.add_argument("--seed", type=flags.seed, default=42)
    args = parser.parse_args()
    if (args.top_p or args.top_k) and not args.temperature:
        parser.error("--top_p and --top_k choose among sampled tokens: they need --temperature above 0")
    if args.overwrite and not args.transcript:
        parser.error("--overwrite needs --transcript")
    system: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    notes: list[str] = []
    listed = generation.read_questions(args, system, notes)

    console.quiet_libraries()
    with console.quick_imports():
        import peft  # noqa: F401 - it comes with the first model, and is most of what is imported
        import transformers  # noqa: F401

    console.quiet_progress_bars()
    generation.print_answers(args, system, listed, notes)


if __name__ == "__main__":
    errors.exit_with(main)
