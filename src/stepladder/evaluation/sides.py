"""The sides of a comparison measured: a model, a server, or a transcript."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepladder.data import row_keys
from stepladder.data.conversation import REASONING
from stepladder.data.formats import Example
from stepladder.data.rows import Rows
from stepladder.errors import DataError, ModelError
from stepladder.evaluation import behaviours, endpoint, generation, held_out, questions
from stepladder.evaluation.compare import Side
from stepladder.evaluation.endpoint import Endpoint
from stepladder.evaluation.questions import Question
from stepladder.model import fingerprint, load, start

FOR_TEMPLATES = {"tool_calls", "tool_call_id", *REASONING}  # keys of a turn that not every server understands
SAMPLE = 24  # rows of the training data and of general knowledge that losses are measured on
MOST_TRAINING_ROWS = 50_000  # that are held to find copies of


@dataclass
class Measured:
    """What each side is measured on; `held_out` and `general` may be missing.

    `training` holds rows that a tuned side was trained on, by its name, where they are known; `suite` the
    behaviours that models are asked for, where the base is one; `bases` where the base of an adapter lies that is not
    where the adapter says.
    """

    questions: list[Question]
    held_out: Rows | None = None
    training: dict[str, Rows] = field(default_factory=dict)
    general: Rows | None = None
    notes: list[str] = field(default_factory=list)
    bases: dict[str, str] = field(default_factory=dict)
    suite: list[behaviours.Task] = field(default_factory=list)
    base: str | Endpoint = ""  # the first side, which answers the suite again for its noise floor


def measure(
    source: str | Endpoint,
    on: Measured,
    max_new_tokens: int,
    template: str | None = None,
    kept: endpoint.Kept | None = None,
    trust_remote_code: bool = False,
) -> Side:
    """A side's answers to all questions and, where it is a model, its losses.

    Args:
        source: a model's folder or hub id, a transcript (.jsonl), or a server.
        template: the chat template for a model that has none.
        kept: where a server's answers are kept until all is measured.
        trust_remote_code: run the Python code that lies beside a model.
    """
    if isinstance(source, Endpoint):
        talks = [question.messages for question in on.questions]
        return Side(str(source), endpoint.answers(source, talks, max_new_tokens, kept, on.notes))
    if is_transcript(source):
        return Side(source, questions.transcript_answers(Path(source), on.questions))
    model, tokenizer = load.for_inference(source, on.bases.get(source), trust_remote_code)
    if tokenizer.chat_template is None and template:
        tokenizer.chat_template = template
        on.notes.append(f"{source} has no chat template and is asked by the tuned model's")
    if tokenizer.chat_template is None and on.held_out and any("messages" in row for row in on.held_out.examples):
        raise ModelError(
            f"'{source}' has no chat template, so it cannot be asked as the data asks",
            help="compare it with a model that was tuned with one (chat_template or prompt_template in its recipe)",
        )
    conversations = [question.example for question in on.questions]
    side = Side(source, generation.generate_answers(model, tokenizer, conversations, max_new_tokens=max_new_tokens))
    if on.held_out:
        side.losses = held_out.measure_losses(model, tokenizer, on.held_out)
    if on.general:
        side.general = held_out.measure_losses(model, tokenizer, on.general)
    own = {source: on.training[source]} if source in on.training else on.training  # the base: all sides' rows
    side.training = {name: held_out.measure_losses(model, tokenizer, rows) for name, rows in own.items()}
    if on.suite and is_model(on.base):
        side.tried = behaviours.ask(model, tokenizer, on.suite, behaviours.REPETITIONS if source == on.base else 0)
        if source == on.base and None in side.tried.kept:
            on.notes.append(f"calling a tool is not measured: the chat template of {source} takes no tools")
    return side


def check(source: str | Endpoint, on: Measured) -> None:
    """Look whether a side is there, before anything slow begins; an adapter without its base is put on `on.base`.

    Raises:
        ModelError, DataError: it is not, or a transcript lacks a question, or a server cannot be asked one.
    """
    if isinstance(source, Endpoint):
        for question in on.questions:
            _check_plain(question, source)
        if on.questions:
            endpoint.probe(source, on.questions[0].messages)
    elif is_transcript(source):
        questions.transcript_answers(Path(source), on.questions)
    else:
        if isinstance(on.base, str) and on.base not in ("", source) and is_model(on.base) and _lacks_base(source):
            on.bases[source] = on.base
            on.notes.append(f"{source} is put on {on.base}: its own base, {start.of(source).base}, is not there")
        begun = start.checked(source, on.bases.get(source))
        if begun.adapter and (note := fingerprint.other_base(begun.adapter, begun.base, begun.revision)):
            on.notes.append(note)


def _lacks_base(source: str) -> bool:
    begun = start.of(source)
    try:
        start.check_source(begun.base)
    except ModelError:
        return begun.adapter is not None
    return False


def _check_plain(question: Question, server: Endpoint) -> None:
    """Refuse a question of which a server's chat completions would not be told all."""
    more = {key for turn in question.messages for key in turn} & FOR_TEMPLATES
    more |= question.example.keys() - {"messages"}
    if more:
        raise DataError(
            f"{server} cannot be asked '{question.text[:60]}'",
            why=f"the question has {', '.join(sorted(more))}, and a server is sent roles and texts alone",
            help="compare model folders or transcripts, or leave such questions out",
        )


def length(sources: Sequence[str | Endpoint], asked: int | None, notes: list[str]) -> int:
    """Within how many new tokens all sides answer: as asked, as the transcripts among them did, or the default.

    Raises:
        DataError: a transcript was made within another number.
    """
    for source in sources:
        if isinstance(source, str) and is_transcript(source):
            cap, temperature = questions.transcript_conditions(Path(source))
            if temperature:
                notes.append(f"{source} was sampled at temperature {temperature:g}; models are asked without sampling")
            if cap is None:
                notes.append(f"{source} does not say within how many tokens it answers")
            elif asked not in (None, cap):
                help = f"--max_new_tokens {cap}, or keep the transcript anew with --max_new_tokens {asked}"
                raise DataError(f"{source} answers within {cap} tokens, the others within {asked}", help=help)
            asked = cap or asked
    return asked or generation.MAX_NEW_TOKENS


def not_measured(sources: Sequence[str | Endpoint], on: Measured) -> list[str]:
    """What no verdict can rest on, and why."""
    notes = [f"{source} tells no losses: what rests on them (better or not, forgetting, the gap) is not measured"
             for source in sources if isinstance(source, Endpoint) or is_transcript(source)]  # fmt: skip
    if on.suite:
        others = [str(source) for source in sources if not is_model(source)]
        why = "servers and transcripts are not asked, nor a model without a base to compare it with"
        notes += [f"behaviours of {', '.join(others)} are not measured: {why}"] if others else []
    if not on.held_out:
        notes.append("without --data no loss on held-out rows is measured")
    if not on.general:
        notes.append("forgetting is not measured: no row of general knowledge is left that was not trained on")
    return notes


def template_of(tuned: list[str], trust_remote_code: bool = False) -> str | None:
    """The chat template of the first tuned model that has one."""
    models = (name for name in tuned if not is_transcript(name))
    templates = (load.tokenizer_of(name, trust_remote_code=trust_remote_code).chat_template for name in models)
    return next(filter(None, templates), None)


def is_model(source: str | Endpoint) -> bool:
    return not (isinstance(source, Endpoint) or is_transcript(source))


def is_transcript(source: str) -> bool:
    return source.endswith(".jsonl")


def training_rows(tuned: str | Endpoint, runs: held_out.Runs) -> Rows | None:
    """Rows that a model was trained on, to know them by heart; None where that cannot be told, with a note."""
    if isinstance(tuned, Endpoint) or not runs.run_folders(tuned):
        note = "is no run folder: what it was trained on is not known, nor whether it knows it by heart"
        runs.notes.append(f"{tuned} {note}")
        return None
    rows = runs.training_rows(tuned)
    return rows.take(range(min(len(rows), MOST_TRAINING_ROWS))) if rows else None


def sample(rows: Rows, without: Collection[str] = (), seed: int = 42) -> Rows | None:
    """A few rows drawn by the seed, none of which has a key in `without`; None where none is left."""
    free = [i for i, example in enumerate(rows.examples) if not without or row_keys.key(example) not in without]
    return rows.take(sorted(random.Random(seed).sample(free, min(SAMPLE, len(free))))) if free else None


def answers_of(rows: Rows) -> list[str]:
    """What a model learns to say from rows: the assistant's turns, or the whole text."""
    return [text for example in rows.examples for text in _said(example)]


def _said(example: Example) -> list[str]:
    if "text" in example:
        return [example["text"]]
    answers = (turn for turn in example["messages"] if turn["role"] == "assistant" and turn.get("train", True))
    return [str(turn["content"]) for turn in answers if turn["content"]]
