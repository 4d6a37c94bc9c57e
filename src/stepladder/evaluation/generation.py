"""Answers from a model, decoded without the prompt: to questions, in a chat, and during training for a tracker."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from stepladder import console, files, hardware
from stepladder.data import render, special_tokens
from stepladder.data.formats import Example
from stepladder.data.rows import Rows
from stepladder.errors import DataError, ModelError, StepladderError
from stepladder.evaluation.questions import (
    Answer,
    Message,
    Question,
    extract_questions,
    read_prompts,
    transcript_row,
)
from stepladder.model import pretrained, start

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from stepladder.training.launch.launcher import Strategy

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_NEW_TOKENS = 128  # of generate.py and compare.py alike: a transcript of one is a side of the other
SAMPLES, SAMPLE_ROWS, SAMPLE_TOKENS = 3, 30, 64  # questions for a tracker, rows tried for them, tokens of an answer
HELP = "Ask away. /reset starts a new conversation, /system TEXT sets the system prompt; an empty line or Ctrl-D ends."


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Example | list[Message]],
    batch_size: int = 16,
    streamer: BaseStreamer | None = None,
    shared: bool = True,
    **sampling: Any,
) -> list[Answer]:
    """The model's next turn for each conversation, in their order; the ranks share them out.

    Args:
        conversations: each ends before an answer, as a row's example (with its tools and
            `chat_template_kwargs`) or as its messages alone. Without a chat template, the user's
            text is the prompt as it stands.
        streamer: is given the tokens as they come (of one conversation).
        shared: False where one rank alone asks.
        sampling: Transformers' generation flags (`max_new_tokens`, `temperature`, …); greedy
            unless `do_sample` is set.

    Raises:
        DataError: the template refuses a conversation, or does not render a part of it.
        ModelError: there is no template and the conversation needs one; a prompt and its answer take more
            positions than the model has.
    """
    import torch

    examples = [asked if isinstance(asked, dict) else {"messages": asked} for asked in conversations]
    texts = [prompt_text(tokenizer, example) for example in examples]
    own_ends = model.generation_config.eos_token_id or []
    ends = sorted({tokenizer.eos_token_id, *(own_ends if isinstance(own_ends, list) else [own_ends])})
    defaults = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    hidden = special_tokens.hidden_in_answers(tokenizer)

    def batch_of(prompts: list[str]) -> list[Answer]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        _check_positions(model, batch["input_ids"].shape[1], sampling.get("max_new_tokens", 1))
        with torch.inference_mode():
            out = model.generate(**batch, streamer=streamer, **{**defaults, **sampling})
        new = out[:, batch["input_ids"].shape[1] :]
        said = [tokenizer.decode([i for i in ids if i not in hidden]) for ids in new.tolist()]
        ended = torch.isin(new, torch.tensor(ends, device=new.device)).any(dim=1).tolist()
        return [Answer(text.strip(), stopped) for text, stopped in zip(said, ended, strict=True)]

    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "PROMPT_TUNING":
        batch_size = 1  # PEFT 0.21 leaves out position ids here, so that padding would move a prompt's positions
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the answer begins where the prompt ends
    try:
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        each = parallel_map(batches, batch_of) if shared else map(batch_of, batches)
        return [answer for batch in each for answer in batch]
    finally:
        tokenizer.padding_side = side


def prompt_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The text that the model continues.

    Raises:
        DataError: the chat template refuses the conversation, or does not render a part of it.
        ModelError: there is no chat template, and more than one text to ask.
    """
    if tokenizer.chat_template is not None:
        try:
            return render.prompt_text(example, tokenizer)
        except DataError as error:
            asked = f"{tokenizer.name_or_path}, asked {str(example['messages'][-1]['content'])[:40]!r}"
            raise DataError(error.what, where=asked, why=error.why, help=error.help) from None
    if len(example["messages"]) > 1 or "tools" in example:
        raise no_template(str(tokenizer.name_or_path))
    return str(example["messages"][-1]["content"])


def no_template(name: str) -> ModelError:
    return ModelError(
        f"'{name}' has no chat template",
        why="of a system prompt or a conversation it would see the last turn alone",
        help="--prompt with all that it should see, or a model with a template (-Instruct)",
    )


def _check_positions(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Refuse what is longer than a table of learned positions (GPT-2, OPT): on a GPU the index kills the process."""
    import torch

    count, words = getattr(model.config, "max_position_embeddings", None), {*model.get_input_embeddings().modules()}
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module not in words)
    if count and prompt + new > count and any(table.num_embeddings in (count, count + 2) for table in tables):
        raise ModelError(
            f"the model has {count} positions: a prompt of {prompt} tokens and {new} new ones need {prompt + new}",
            help=f"--max_new_tokens {count - prompt} at most" if prompt < count else "a shorter prompt",
        )


def can_be_asked(tokenizer: PreTrainedTokenizerBase, question: Question) -> bool:
    """False where the chat template refuses the question, or does not render a part of it."""
    try:
        prompt_text(tokenizer, question.example)
    except StepladderError:
        return False
    return True


def parallel_map(batches: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
    """The results of all batches, in their order, on every rank; rank r of n does batches r, r + n, ….

    The batches do not depend on the number of ranks: a row meets the same padding, and so the same rounding.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [work(batch) for batch in batches]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine, fault = [], None
    try:
        mine = [work(batch) for batch in batches[rank::ranks]]
    except StepladderError as error:  # one rank's endpoint may fail alone: none is left waiting for the others
        fault = error
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, (mine, fault))
    for _, found in parts:
        if found:
            raise found
    rounds = zip_longest(*(done for done, _ in parts))
    return [result for results in rounds for result in results][: len(batches)]


def sample_asker(
    rows: Any, tokenizer: PreTrainedTokenizerBase, strategy: Strategy, precision: str
) -> Callable[[Any], list[dict[str, str]]] | None:
    """What asks a model the first questions of `rows` that the chat template renders.

    None where there are none, or the strategy shards the weights: only rank 0 asks, and has a part of them.
    """
    if not isinstance(rows, Rows) or strategy.shards_weights:
        return None
    first = extract_questions(rows.take(range(min(SAMPLE_ROWS, len(rows)))))
    asked = [question for question in first if can_be_asked(tokenizer, question)][:SAMPLES]

    def ask(model: Any) -> list[dict[str, str]]:
        import torch

        trains, caches = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        low = hardware.dtype_of(precision)
        asked_of = [question.example for question in asked]
        try:
            with torch.autocast(model.device.type, low, enabled=low != torch.float32):  # as it trains
                said = generate_answers(model, tokenizer, asked_of, shared=False, max_new_tokens=SAMPLE_TOKENS)
        finally:
            model.train(trains)
            model.config.use_cache = caches
        return [
            {"question": question.text, "reference": question.reference, "answer": answer.text}
            for question, answer in zip(asked, said, strict=True)
        ]

    return ask if asked else None


def read_questions(args: argparse.Namespace, system: list[Message], notes: list[str]) -> list[Question]:
    """The questions of --prompt and --prompts, once the flags of generate.py are checked.

    Raises:
        DataError: a file of questions or the transcript cannot be used.
        ModelError: there is no such model.
    """
    found = [Question([*system, {"role": "user", "content": text}]) for text in args.prompt or []]
    if args.prompts:
        found = [_under(system, question) for question in read_prompts(args.prompts, notes)]
    start.resolve_existing_model(args.model, args.base)
    if args.transcript:
        files.make_folder(args.transcript.parent)
        if args.transcript.is_dir() or (args.transcript.exists() and not args.overwrite):
            help = "name a file in it" if args.transcript.is_dir() else "another name, or --overwrite"
            raise DataError(f"the transcript {args.transcript} is there already", help=help)
    return found


def print_answers(args: argparse.Namespace, system: list[Message], listed: list[Question], notes: list[str]) -> None:
    """Print each answer, of listed questions or a conversation, and keep it where a transcript is asked for."""
    import transformers

    transformers.set_seed(args.seed)
    sampling = {"max_new_tokens": args.max_new_tokens, "do_sample": bool(args.temperature)}
    keys = ("temperature", "top_p", "top_k", "repetition_penalty")
    sampling |= {name: value for name in keys if (value := getattr(args, name))}
    model, tokenizer = pretrained.load_for_inference(args.model, args.base, args.trust_remote_code)
    if tokenizer.chat_template is None and (args.chat or system):
        raise no_template(args.model)
    streamer = transformers.TextStreamer(_WithoutHidden(tokenizer), skip_prompt=True)

    for note in notes:
        console.warn(f"note: {note}")
    kept = []
    several = args.prompts or (args.prompt and len(args.prompt) > 1)
    for question in listed:  # one that the template refuses is reported before the first is answered
        prompt_text(tokenizer, question.example)
    for question in _chat(system) if args.chat else listed:
        if several:
            print(f"> {question.text}")
        (answer,) = generate_answers(model, tokenizer, [question.example], streamer=streamer, **sampling)
        if args.transcript:
            kept.append(transcript_row(args.model, question.example, answer, args.max_new_tokens, args.temperature))
            files.write_atomic(args.transcript, "".join(kept))
        if args.chat:
            question.messages.append({"role": "assistant", "content": answer.text})
        if args.chat or several:
            print()


class _WithoutHidden:
    """A tokenizer for a streamer, which decodes what an answer is printed with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.hidden = tokenizer, special_tokens.hidden_in_answers(tokenizer)

    def decode(self, ids: list[int], **options: Any) -> str:
        return str(self.tokenizer.decode([i for i in ids if i not in self.hidden], **options))


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
