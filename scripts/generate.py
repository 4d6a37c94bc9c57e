"""Ask a model: a base, a run folder, an adapter or a merged model. The answer appears as it is made.

    python scripts/generate.py --model runs/lora --prompt "How do I track my order?"
    python scripts/generate.py --model runs/lora --chat --system "You are TechCo's support."
    python scripts/generate.py --model models/smollm2-135m-instruct --prompts questions.txt --transcript kept.jsonl

A transcript is a side of a comparison: compare.py --base kept.jsonl --tuned runs/lora --prompts questions.txt
One that is there already is kept unless --overwrite is given.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from stepladder import console, errors, flags, run
from stepladder.errors import DataError
from stepladder.evaluation import questions, transcript
from stepladder.evaluation.generate import MAX_NEW_TOKENS, Message, answers, no_template, prompt_text
from stepladder.evaluation.questions import Question
from stepladder.model import load, start

HELP = "Ask away. /reset begins anew, /system TEXT sets the system prompt; an empty line or Ctrl-D ends."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--base", help="of an adapter: where its base is now (where it was trained on it)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a question; may be given several times")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="questions, one a line (.txt) or as JSONL rows")
    what.add_argument("--chat", action="store_true", help="a conversation; /reset begins it anew")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--transcript", type=Path, metavar="FILE", help="keep questions and answers as JSONL")
    parser.add_argument("--overwrite", action="store_true", help="replace the transcript that is there")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=flags.count, default=MAX_NEW_TOKENS)
    parser.add_argument("--temperature", type=flags.from_0, default=0.0, help="above 0 samples; at 0 it is greedy (0)")
    parser.add_argument("--top_p", "--top-p", type=flags.share, help="with --temperature")
    parser.add_argument("--top_k", "--top-k", type=flags.count, help="with --temperature")
    parser.add_argument("--repetition_penalty", "--repetition-penalty", type=flags.above_0)
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=flags.TRUST)
    parser.add_argument("--seed", type=flags.whole, default=42)
    args = parser.parse_args()
    if (args.top_p or args.top_k) and not args.temperature:
        parser.error("--top_p and --top_k choose among sampled tokens: they need --temperature above 0")
    if args.overwrite and not args.transcript:
        parser.error("--overwrite is of --transcript")
    system: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    notes: list[str] = []
    listed = [Question([*system, {"role": "user", "content": text}]) for text in args.prompt or []]
    if args.prompts:
        listed = [_under(system, question) for question in questions.from_file(args.prompts, notes)]
    start.checked(args.model, args.base)
    if args.transcript:
        run.make_folder(args.transcript.parent)
        if args.transcript.is_dir() or (args.transcript.exists() and not args.overwrite):
            help = "name a file in it" if args.transcript.is_dir() else "another name, or --overwrite"
            raise DataError(f"the transcript {args.transcript} is there already", help=help)

    console.quiet_libraries()
    with console.quick_imports():
        import peft  # noqa: F401 - it comes with the first model, and is most of what is imported
        import transformers

    console.quiet_progress_bars()
    transformers.set_seed(args.seed)
    sampling = {"max_new_tokens": args.max_new_tokens, "do_sample": bool(args.temperature)}
    keys = ("temperature", "top_p", "top_k", "repetition_penalty")
    sampling |= {name: value for name in keys if (value := getattr(args, name))}
    model, tokenizer = load.for_inference(args.model, args.base, args.trust_remote_code)
    if tokenizer.chat_template is None and (args.chat or system):
        raise no_template(args.model)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    for note in notes:
        console.warn(f"note: {note}")
    kept = []
    several = args.prompts or (args.prompt and len(args.prompt) > 1)
    for question in listed:  # one that the template refuses is told before the first is answered
        prompt_text(tokenizer, question.example)
    for question in _chat(system) if args.chat else listed:
        if several:
            print(f"> {question.text}")
        (answer,) = answers(model, tokenizer, [question.example], streamer=streamer, **sampling)
        if args.transcript:
            kept.append(transcript.row(args.model, question.example, answer, args.max_new_tokens, args.temperature))
            run.write_whole(args.transcript, "".join(kept))
        if args.chat:
            question.messages.append({"role": "assistant", "content": answer.text})
        if args.chat or several:
            print()


def _under(system: list[Message], question: Question) -> Question:
    if system and question.messages[0]["role"] in ("system", "developer"):
        said = question.messages[0]["content"][:60]
        raise DataError(f"--system is given, and a row has one of its own: {said!r}", help="leave one of them out")
    return question._replace(messages=system + question.messages)


def _chat(system: list[Message]) -> Iterator[Question]:
    """The conversation each time the user has said something; the answer is appended to it from outside."""
    print(HELP)
    messages = list(system)
    while question := _ask():
        if question == "/reset":
            messages = list(system)
            print("(a new conversation)")
        elif question.startswith("/system "):
            system = [{"role": "system", "content": question.removeprefix("/system ").strip()}]
            messages = list(system)
            print("(a new conversation under this system prompt)")
        elif question.startswith("/"):
            print(HELP)
        else:
            messages.append({"role": "user", "content": question})
            yield Question(messages)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    errors.exit_with(main)
