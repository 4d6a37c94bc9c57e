"""Ask a model: a base, a run folder, an adapter or a merged model. The answer appears as it is made.

    python scripts/generate.py --model runs/lora --prompt "How do I track my order?"
    python scripts/generate.py --model runs/lora --chat --system "You are TechCo's support."
    python scripts/generate.py --model models/smollm2-135m-instruct --prompts questions.txt --transcript kept.jsonl

A transcript is a side of a comparison: compare.py --base kept.jsonl --tuned runs/lora --prompts questions.txt
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from stepladder import console, errors, run
from stepladder.evaluation import questions, transcript
from stepladder.evaluation.generate import Message, answers
from stepladder.model import load

HELP = "Ask away. /reset begins anew, /system TEXT sets the system prompt; an empty line or Ctrl-D ends."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a question; may be given several times")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="questions, one a line (.txt) or as JSONL rows")
    what.add_argument("--chat", action="store_true", help="a conversation; /reset begins it anew")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--transcript", type=Path, metavar="FILE", help="keep questions and answers as JSONL")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, help="above 0 samples; without it the answer is greedy")
    parser.add_argument("--top_p", "--top-p", type=float)
    parser.add_argument("--top_k", "--top-k", type=int)
    parser.add_argument("--repetition_penalty", "--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    system: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    if args.chat:
        conversations = _chat(system)
    elif args.prompts:
        conversations = iter([system + question.messages for question in questions.from_file(args.prompts)])
    else:
        conversations = iter([[*system, {"role": "user", "content": text}] for text in args.prompt])
    load.check_source(args.model)
    if args.transcript:
        run.make_folder(args.transcript.parent)

    console.quiet_libraries()
    import transformers

    console.quiet_progress_bars()
    transformers.set_seed(args.seed)
    sampling = {"max_new_tokens": args.max_new_tokens, "do_sample": bool(args.temperature)}
    flags = ("top_p", "top_k", "repetition_penalty") + (("temperature",) if args.temperature else ())
    sampling |= {name: value for name in flags if (value := getattr(args, name)) is not None}
    model, tokenizer = load.for_inference(args.model)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    kept = []
    several = args.prompts or (args.prompt and len(args.prompt) > 1)
    for messages in conversations:
        if several:
            print(f"> {messages[-1]['content']}")
        (answer,) = answers(model, tokenizer, [messages], streamer=streamer, **sampling)
        if args.transcript:
            kept.append(transcript.row(args.model, messages, answer))
            run.write_whole(args.transcript, "".join(kept))
        if args.chat:
            messages.append({"role": "assistant", "content": answer.text})
        if args.chat or several:
            print()


def _chat(system: list[Message]) -> Iterator[list[Message]]:
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
            yield messages


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    errors.exit_with(main)
