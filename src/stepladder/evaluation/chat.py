"""Questions asked on the command line, and a model's answers as they are made (generate.py)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from stepladder import console, files
from stepladder.errors import DataError
from stepladder.evaluation import questions, transcript
from stepladder.evaluation.generate import Message, answers, no_template, prompt_text
from stepladder.evaluation.questions import Question
from stepladder.model import load, start

HELP = "Ask away. /reset begins anew, /system TEXT sets the system prompt; an empty line or Ctrl-D ends."


def read_questions(args: argparse.Namespace, system: list[Message], notes: list[str]) -> list[Question]:
    """The questions of --prompt and --prompts, after what can be wrong of the flags was checked.

    Raises:
        DataError: a file of questions or the transcript cannot be used.
        ModelError: there is no such model.
    """
    found = [Question([*system, {"role": "user", "content": text}]) for text in args.prompt or []]
    if args.prompts:
        found = [_under(system, question) for question in questions.from_file(args.prompts, notes)]
    start.checked(args.model, args.base)
    if args.transcript:
        files.make_folder(args.transcript.parent)
        if args.transcript.is_dir() or (args.transcript.exists() and not args.overwrite):
            help = "name a file in it" if args.transcript.is_dir() else "another name, or --overwrite"
            raise DataError(f"the transcript {args.transcript} is there already", help=help)
    return found


def answer(args: argparse.Namespace, system: list[Message], listed: list[Question], notes: list[str]) -> None:
    """Print each answer, of listed questions or a conversation, and keep it where a transcript is asked for."""
    import transformers

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
            files.write_whole(args.transcript, "".join(kept))
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
