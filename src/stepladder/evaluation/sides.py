"""compare.py: the sides of a comparison (models, a server, transcripts) checked, measured, and the result written."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from stepladder import console, errors, files, installation, manifest
from stepladder.data import mixture
from stepladder.data.conversation import REASONING
from stepladder.data.rows import Rows, row_key
from stepladder.errors import DataError, ModelError
from stepladder.evaluation import behaviours, comparison, endpoint, generation, held_out, metrics, questions, verdicts
from stepladder.evaluation.comparison import Side
from stepladder.evaluation.endpoint import Endpoint
from stepladder.evaluation.questions import Question
from stepladder.model import fingerprint, pretrained, start
from stepladder.reporting import markdown, page
from stepladder.training.launch import devices, launcher

SideSource = str | Endpoint  # a model's folder or hub id, a transcript (.jsonl), or a server
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
    base: SideSource = ""  # the first side, which answers the suite again for its noise floor
    on_training: bool = False  # no row was held out: all are training rows
    left_out: int = 0  # rows that were trained on


def run_comparison(args: argparse.Namespace, fail: Callable[[str], NoReturn]) -> int | None:
    """Check what compare.py was asked for, measure each side, write and print what differs.

    What can be wrong with the files is found before torch is imported.

    Args:
        args: the flags of compare.py.
        fail: ends with a message on the usage of the flags.

    Returns:
        EXIT_UNMET where a required claim does not hold, on the rank that writes.
    """
    runs = held_out.Runs([])
    sources = _name_sources(args, runs, fail)
    server = next((source for source in sources if isinstance(source, Endpoint)), None)
    rules = metrics.read_rubric(args.rubric) if args.rubric else []
    required = verdicts.read_claims(args.require, rules)
    trained = {name: keys for name in sources if isinstance(name, str) and (keys := runs.trained_keys(name))}
    on = _choose_rows(args, runs, trained, sources[0])
    on.suite = behaviours.read() if args.behaviours or verdicts.needs_behaviours(required) else []
    wants_general = args.general or installation.locate(mixture.GENERAL).is_file()
    general = mixture.from_name(str(args.general or mixture.GENERAL)) if wants_general else None
    for source in sources:
        check(source, on)
    max_new_tokens = choose_length(sources, args.max_new_tokens, on.notes)
    folder = args.output_dir or next((Path(name) for name in args.tuned[:1] if _is_run(name)), None)
    if folder is None:
        fail("--output_dir is needed: the first --tuned is no run folder")
    files.make_folder(folder)
    rows = {str(name): found for name in sources[1:] if (found := training_rows(name, runs))}
    on.notes += [] if on.on_training else held_out.note_asked_questions(on.questions, rows)
    on.training = {name: drawn for name, found in rows.items() if (drawn := draw_sample(found))}
    on.general = draw_sample(general, without=set().union(*trained.values())) if general else None
    on.notes += not_measured(sources, on)
    kept = endpoint.Kept(folder / "server_answers.jsonl", server, max_new_tokens) if server else None
    if kept and kept.known:
        on.notes.append(f"{len(kept.known)} answers of {server} were kept by a comparison that failed")

    measured, is_writer = _measure_all(args, sources, on, max_new_tokens, kept)
    if not is_writer:
        return None
    answers = {name: verdicts.TrainedAnswers(training_answers(found)) for name, found in rows.items()}
    facts = _facts(on, max_new_tokens)

    def compare(some: list[Side]) -> dict[str, Any]:
        found = facts | comparison.build_comparison(some, on.questions, rules, answers, on.on_training)
        return found | ({"required": verdicts.judge_claims(required, found)} if required else {})

    result = compare(measured)
    others = _write(folder, args.tuned, measured, result, compare)
    if kept:
        kept.remove()
    _print(args, folder, result, others)
    return None if all(claim["met"] for claim in result.get("required", [])) else errors.EXIT_UNMET


def _facts(on: Measured, max_new_tokens: int) -> dict[str, Any]:
    """What compare.json says of how the comparison was made."""
    compared = len(on.held_out or [])
    return {
        "command": installation.typed_command(),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "held_out_rows": 0 if on.on_training else compared,
        "training_rows": compared if on.on_training else 0,
        "left_out_rows": on.left_out,
        "max_new_tokens": max_new_tokens,
        "notes": on.notes,
    }


def _name_sources(args: argparse.Namespace, runs: held_out.Runs, fail: Callable[[str], NoReturn]) -> list[SideSource]:
    """The base, the tuned models and the server, the first being what the others are compared with."""
    if bool(args.endpoint) != bool(args.model):
        fail("--endpoint and --model go together")
    if not (args.data or args.prompts or (args.tuned and runs.run_folders(args.tuned[0]))):
        fail("--data FILE or --prompts FILE is needed: the first --tuned is no run, which holds rows out")
    if args.tuned and not (args.base or args.endpoint):
        args.base = runs.base_of(args.tuned[0])
    server = [Endpoint(args.endpoint, args.model, args.timeout)] if args.endpoint else []
    sources = [args.base, *args.tuned, *server] if args.base else [*server, *args.tuned]
    if len(sources) < 2:
        fail("two sides are needed: --base and --tuned, or one of them and --endpoint")
    names = [os.path.normpath(source) if isinstance(source, str) else source for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fail(f"{twice} is named twice: a comparison needs different sides")
    return sources


def _choose_rows(
    args: argparse.Namespace, runs: held_out.Runs, trained: dict[str, set[str]], base: SideSource
) -> Measured:
    """The rows and questions that no side was trained on; where each row was, they are training rows."""
    notes, rows, on_training, given = runs.notes, None, False, 0
    if args.data or not args.prompts:
        rows = mixture.from_name(args.data) if args.data else runs.held_out(args.tuned[0])
        notes += rows.notes
        rows = held_out.leave_out_copies(rows, notes)
        given = len(rows)
        rows, on_training = held_out.leave_out_trained(rows, trained, notes)
        if on_training and args.prompts:
            raise DataError("each row of --data was trained on", help="other rows, or --prompts alone")
        asked = questions.extract_questions(rows)
    if args.prompts:
        asked = held_out.leave_out_copied_prompts(questions.read_prompts(args.prompts, notes), notes)
        asked = held_out.leave_out_trained_prompts(asked, trained, notes)
    notes += questions.remarks(asked, None if args.prompts else rows)
    left_out = given - len(rows or [])
    return Measured(asked[: args.limit], rows, notes=notes, base=base, on_training=on_training, left_out=left_out)


def _measure_all(
    args: argparse.Namespace, sources: list[SideSource], on: Measured, max_new_tokens: int, kept: endpoint.Kept | None
) -> tuple[list[Side], bool]:
    """All sides measured, by all ranks, and whether this rank writes the result."""
    launch = launcher.read_launch()
    console.quiet_libraries()
    with console.quick_imports():
        use_cpu = devices.choose_device(launch)
        import accelerate

    console.quiet_progress_bars()
    state = accelerate.PartialState(cpu=use_cpu)  # the ranks meet
    template = find_template(args.tuned, args.trust_remote_code)
    measured = {}
    for source in sorted(
        sources, key=lambda source: not isinstance(source, Endpoint)
    ):  # a server first: it may fail by others' fault
        began = time.perf_counter()
        side = measured[source] = measure(source, on, max_new_tokens, template, kept, args.trust_remote_code)
        if not args.json:
            suite = f" and {sum(one is not None for one in side.tried.kept)} of behaviours" if side.tried else ""
            console.say(f"{source}: {len(on.questions)} answers{suite} in {time.perf_counter() - began:.0f} s")
    return [measured[source] for source in sources], state.is_main_process


def _write(
    folder: Path,
    tuned: list[str],
    measured: list[Side],
    found: dict[str, Any],
    compare: Callable[[list[Side]], dict[str, Any]],
) -> list[str]:
    """Write a comparison into `folder`, and into each other run that of the run and the base; these runs' names.

    The page and the mini-project of a run are made from its own comparison.
    """
    texts = {
        folder / "compare.json": _as_text(found),
        folder / "evaluation_results.md": markdown.evaluation_results(found),
        folder / "report.html": page.render_comparison(folder, [Path(name) for name in tuned], found),
    }
    others = [side for side in measured[1:] if _is_run(side.name) and Path(side.name).resolve() != folder.resolve()]
    others = [side for side in others if os.access(side.name, os.W_OK)]
    texts |= {Path(side.name) / "compare.json": _as_text(compare([measured[0], side])) for side in others}
    for file, text in texts.items():  # all are made before the first is written
        files.write_atomic(file, text)
    return [side.name for side in others]


def _print(args: argparse.Namespace, folder: Path, found: dict[str, Any], others: list[str]) -> None:
    if args.json:
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
        return
    print(markdown.for_terminal(found, args.show))
    if args.tuned and _is_run(args.tuned[0]):
        print(markdown.run_size(page.read(Path(args.tuned[0])).facts))
    print(f"everything lies in {folder}/: evaluation_results.md, compare.json, report.html")
    for name in others:
        print(f"{name}'s own comparison with the base is kept in {name}/compare.json")
    if "required" in found:
        print(*verdicts.claim_lines(found["required"]), sep="\n")


def _is_run(name: str) -> bool:
    return (Path(name) / manifest.MANIFEST).is_file()


def _as_text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def measure(
    source: SideSource,
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
    model, tokenizer = pretrained.load_for_inference(source, on.bases.get(source), trust_remote_code)
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


def check(source: SideSource, on: Measured) -> None:
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
            own = start.resolve_model(source).base
            on.notes.append(f"{source} is put on {on.base}: its own base, {own}, is not there")
        begun = start.resolve_existing_model(source, on.bases.get(source))
        if begun.adapter and (note := fingerprint.note_other_base(begun.adapter, begun.base, begun.revision)):
            on.notes.append(note)


def _lacks_base(source: str) -> bool:
    begun = start.resolve_model(source)
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


def choose_length(sources: Sequence[SideSource], asked: int | None, notes: list[str]) -> int:
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
                help = f"--max_new_tokens {cap}, or write the transcript again with --max_new_tokens {asked}"
                raise DataError(f"{source} answers within {cap} tokens, the others within {asked}", help=help)
            asked = cap or asked
    return asked or generation.MAX_NEW_TOKENS


def not_measured(sources: Sequence[SideSource], on: Measured) -> list[str]:
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


def find_template(tuned: list[str], trust_remote_code: bool = False) -> str | None:
    """The chat template of the first tuned model that has one."""
    models = (name for name in tuned if not is_transcript(name))
    templates = (pretrained.load_tokenizer(name, trust_remote_code=trust_remote_code).chat_template for name in models)
    return next(filter(None, templates), None)


def is_model(source: SideSource) -> bool:
    return not (isinstance(source, Endpoint) or is_transcript(source))


def is_transcript(source: str) -> bool:
    return source.endswith(".jsonl")


def training_rows(tuned: SideSource, runs: held_out.Runs) -> Rows | None:
    """Rows that a model was trained on, to know them by heart; None where that cannot be told, with a note."""
    if isinstance(tuned, Endpoint) or not runs.run_folders(tuned):
        note = "is no run folder: what it was trained on is not known, nor whether it knows it by heart"
        runs.notes.append(f"{tuned} {note}")
        return None
    rows = runs.training_rows(tuned)
    return rows.take(range(min(len(rows), MOST_TRAINING_ROWS))) if rows else None


def draw_sample(rows: Rows, without: Collection[str] = (), seed: int = 42) -> Rows | None:
    """A few rows drawn by the seed, none of which has a key in `without`; None where none is left."""
    free = [i for i, example in enumerate(rows.examples) if not without or row_key(example) not in without]
    return rows.take(sorted(random.Random(seed).sample(free, min(SAMPLE, len(free))))) if free else None


def training_answers(rows: Rows) -> list[str]:
    """What a model learns to say from rows: the assistant's turns, or the whole text."""
    found = []
    for example in rows.examples:
        turns = (
            turn for turn in example.get("messages", ()) if turn["role"] == "assistant" and turn.get("train", True)
        )
        found += [example["text"]] if "text" in example else [str(t["content"]) for t in turns if t["content"]]
    return found
