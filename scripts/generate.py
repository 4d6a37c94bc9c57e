"""Ask a model: a base, a run folder, an adapter or a merged model.

python scripts/generate.py --model runs/lora --prompt "How do I track my order?"
python scripts/generate.py --model runs/lora --chat
"""

import argparse

from stepladder import console, errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a question; may be given several times")
    what.add_argument("--chat", action="store_true", help="a conversation; an empty line or Ctrl-D ends it")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, help="above 0 samples; without it the answer is greedy")
    parser.add_argument("--top_p", "--top-p", type=float)
    parser.add_argument("--top_k", "--top-k", type=int)
    parser.add_argument("--repetition_penalty", "--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    console.quiet_libraries()
    import transformers

    from stepladder.evaluation.generate import answers
    from stepladder.model import load

    console.quiet_progress_bars()
    transformers.set_seed(args.seed)
    sampling = {"max_new_tokens": args.max_new_tokens, "do_sample": bool(args.temperature)}
    flags = ("top_p", "top_k", "repetition_penalty") + (("temperature",) if args.temperature else ())
    sampling |= {name: value for name in flags if (value := getattr(args, name)) is not None}
    model, tokenizer = load.for_inference(args.model)
    history = [{"role": "system", "content": args.system}] if args.system else []

    if args.prompt:
        conversations = [[*history, {"role": "user", "content": prompt}] for prompt in args.prompt]
        for prompt, answer in zip(args.prompt, answers(model, tokenizer, conversations, **sampling), strict=True):
            print((f"> {prompt}\n" if len(args.prompt) > 1 else "") + answer.text)
        return
    print("Ask away; an empty line ends the conversation.")
    while question := _ask():
        history.append({"role": "user", "content": question})
        (answer,) = answers(model, tokenizer, [history], **sampling)
        history.append({"role": "assistant", "content": answer})
        print(answer + "\n")


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    errors.exit_with(main)
