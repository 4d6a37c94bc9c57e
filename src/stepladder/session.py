"""A training run, in the one order that its parts can come in: check, prepare, build, train, finish.

`check` reports a user's mistake before PyTorch is imported, which takes seconds; only a valid recipe may restart the
process under another allocator. `prepare` imports the libraries, after the device is chosen, since CUDA reads its
environment once. The ranks meet there: from then on all take the same path through this module, or the others would
wait for the one that does not. `build` draws the adapter's first weights, after the seed is set. The run folder is
written after all that can fail, so a failed start leaves an older run untouched. `train` records the run in `run.json`;
`finish` prints the result. Each stage returns a frozen value, which the next one takes.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepladder import console, errors, requirements
from stepladder.cluster import staging
from stepladder.data import mixture, special_tokens, templates
from stepladder.data.rows import LISTED, Rows, Stream
from stepladder.model import adapter_recipe, fixed_values, fp8, initial_factors, pretrained, start
from stepladder.recipe import load
from stepladder.recipe.recipe import Recipe, StepLayout
from stepladder.reporting import page
from stepladder.run import Run
from stepladder.training import arguments, inputs
from stepladder.training.checkpoint import resume
from stepladder.training.guard import signals
from stepladder.training.launch import devices, launcher, native, ranks, transport

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from stepladder.model.build import Built as BuiltModel
    from stepladder.training.trainer import Trainer


@dataclass(frozen=True)
class Checked:
    """What is known before a library is imported.

    Attributes:
        recipe: as it was written, with the values of the adapter that it trains on.
        step: how the global batch is cut; `auto` keys are cut by the plan in `prepare`.
        train_rows: None on the ranks that do not read them.
        checkpoint: that the run resumes from.
        notes: for the run's opening lines.
    """

    launch: launcher.Launch
    recipe: Recipe
    step: StepLayout
    train_rows: Any
    eval_rows: Rows | None
    record: Run
    inputs: inputs.Inputs
    checkpoint: Path | None
    notes: list[str]


@dataclass(frozen=True)
class Prepared:
    """What trains beside the model.

    Attributes:
        recipe: with the values that the plan has chosen for `auto`; the run records `checked.recipe`.
        planned: the plan as `run.json` holds it; empty on other ranks than the first, and where there is none.
    """

    checked: Checked
    recipe: Recipe
    step: StepLayout
    checkpoint: Path | None
    use_cpu: bool
    precision: str
    devices: list[str]
    arguments: Any
    tokenizer: PreTrainedTokenizerBase
    new_tokens: list[special_tokens.NewToken]
    train_set: Any
    eval_set: Any
    planned: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Built:
    """The base, and the model that trains: the base itself, or an adapter around it."""

    prepared: Prepared
    base: Any
    model: BuiltModel


@dataclass(frozen=True)
class Trained:
    built: Built
    preempted: bool


def check(args: argparse.Namespace, overrides: list[str]) -> Checked:
    """Validate recipe, versions, data, launch and run folder before PyTorch is imported.

    Raises:
        StepladderError: what is wrong, why, and how to fix it.
    """
    launch, recipe = launcher.read_launch(), load.load(args.recipe, overrides)
    arguments.check_flags(args.allow_change, args.callback)
    devices.use_tcmalloc()  # it restarts the process, so only once the recipe is known to be right
    devices.let_segments_grow()
    requirements.versions(recipe)
    requirements.accounts(recipe)
    requirements.compiler(recipe)
    staging.check_stage(recipe)
    recipe = adapter_recipe.settle(recipe)
    step = arguments.layout(recipe, launch.ranks)
    arguments.check_streaming(recipe)
    arguments.check_stop(recipe, args.stop_at_step)
    notes = requirements.untested_versions() + recipe.notes + arguments.check_strategy(recipe, launch)
    # One rank per node reads and prepares the rows; the others open the result.
    train_rows, eval_rows = mixture.load(recipe) if launch.local_rank == 0 else mixture.load_stream(recipe)
    templates.check_path(recipe)
    record = Run(recipe.output_dir, is_writer=launch.rank == 0)
    basis = inputs.Inputs(recipe, eval_rows, reads=launch.rank == 0)
    resume.check_unreached(record, recipe, None if args.overwrite else args.stop_at_step)
    checkpoint = resume.claim(record, recipe, args.resume, args.overwrite, args.allow_change, basis)
    return Checked(launch, recipe, step, train_rows, eval_rows, record, basis, checkpoint, notes)


def prepare(checked: Checked) -> Prepared:
    """Import the libraries, let the ranks meet, tokenize the rows once per node, and plan the memory.

    Raises:
        StepladderError: the launch differs from what was asked for, a row or the template is invalid, or the run does
            not fit.
    """
    launch, recipe, record = checked.launch, checked.recipe, checked.record
    console.quiet_libraries()
    with console.quick_imports():
        use_cpu = devices.choose_device(launch, recipe.get("use_cpu"))  # before a library touches CUDA
        _import_libraries()
    console.quiet_progress_bars()
    native.check_device(recipe)
    fp8.check_device(recipe, use_cpu)
    precision = pretrained.precision(recipe)
    notes = checked.notes + [
        f"{key}: true changes nothing on a CPU" for key in arguments.GPU_ONLY if use_cpu and recipe.get(key)
    ]
    notes += launcher.settle_mesh(launch)
    notes += launcher.leave_to_recipe(precision, checked.step.accumulation, recipe.get("max_grad_norm"))
    with ranks.meeting(launch, record.folder):
        training_args = arguments.build(recipe, checked.step, precision, use_cpu, launch.strategy)
    rank_devices = ranks.assert_launch(launch, str(training_args.device))
    transport.check_choice(launch)
    ranks.shard_on_cpu(launch)
    checkpoint, record.forgets_best = ranks.from_first((checked.checkpoint, record.forgets_best))
    tokenizer, new_tokens = _prepare_tokenizer(checked, notes)
    arguments.check_new_tokens(recipe, launch, new_tokens)
    train_set, eval_set = _prepare_rows(checked, tokenizer, notes)
    planned = _plan(checked, train_set, precision, use_cpu, notes) if launch.rank == 0 else {}
    step = checked.step
    if recipe.plans():  # `auto`: the plan cuts the global batch
        planned = ranks.from_first(planned)
        recipe = recipe.with_values(**{key: planned["chosen"][key] for key in recipe.plans()})
        step = arguments.layout(recipe, launch.ranks)
        training_args = arguments.build(recipe, step, precision, use_cpu, launch.strategy)
    return Prepared(
        checked, recipe, step, checkpoint, use_cpu, precision, rank_devices, training_args, tokenizer, new_tokens,
        train_set, eval_set, planned, notes,
    )  # fmt: skip


def _import_libraries() -> None:
    """Import what the next stages use, together, while nothing else prints (`console.quick_imports`)."""
    import transformers  # noqa: F401

    from stepladder.data import prepare  # noqa: F401
    from stepladder.evaluation import generation  # noqa: F401
    from stepladder.model import build  # noqa: F401
    from stepladder.planning import choose  # noqa: F401
    from stepladder.training import result, trainer  # noqa: F401
    from stepladder.training.guard import interruptions  # noqa: F401
    from stepladder.training.watch import telemetry, terminal, trackers  # noqa: F401


def _prepare_tokenizer(
    checked: Checked, notes: list[str]
) -> tuple[PreTrainedTokenizerBase, list[special_tokens.NewToken]]:
    """The tokenizer with the recipe's tokens and template, and which are new; compared with those of a resumed run."""
    tokenizer = pretrained.load_tokenizer_for(checked.recipe)
    own_template, known = tokenizer.chat_template, special_tokens.known_notes(tokenizer, checked.recipe)
    checked.inputs.add_tokenizer(tokenizer)
    new_tokens = templates.prepare(tokenizer, checked.recipe)
    checked.inputs.add_template(tokenizer)
    notes += known + start.template_notes(checked.recipe, own_template, tokenizer.chat_template)
    return tokenizer, new_tokens


def _prepare_rows(checked: Checked, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> tuple[Any, Any]:
    """The rows as tokens, for training and evaluation."""
    from stepladder.data import prepare

    launch, train_rows, eval_rows = checked.launch, checked.train_rows, checked.eval_rows
    folder = ranks.once_per_node(launch, lambda: prepare.prepare_rows(train_rows, eval_rows, tokenizer, checked.recipe))
    train_set, eval_set = prepare.open_prepared(folder)
    if launch.rank == 0:
        notes += checked.inputs.notes
        notes += prepare.read_notes(folder, train_rows, eval_rows)
    if isinstance(train_rows, Stream):  # each rank reads it for itself
        notes += prepare.stream_notes(train_rows, tokenizer, checked.recipe) if launch.rank == 0 else []
        train_set = prepare.prepare_stream(train_rows, tokenizer, checked.recipe)
    return train_set, eval_set


def _plan(checked: Checked, train_set: Any, precision: str, use_cpu: bool, notes: list[str]) -> dict[str, Any]:
    """The plan as `run.json` holds it; empty, with a note why, where there is none.

    Raises:
        ModelError: `auto` needs a plan, and there is none.
        LaunchError: the disk is too small for the planned files.
    """
    from stepladder.data import prepare
    from stepladder.planning import choose

    launch, recipe, record = checked.launch, checked.recipe, checked.record
    longest = min(filter(None, (recipe.get("max_length"), prepare.longest(train_set))), default=None)
    try:
        plan, way = choose.plan_run(recipe, launch, precision, longest, gpu=not use_cpu)
        requirements.disk(recipe, record.folder, *plan.sizes(way), record.replaced_bytes())
        return choose.plan_for_manifest(plan, way)
    except errors.ModelError as error:
        if recipe.plans():
            raise
        notes.append(f"no plan: {error.what}")
        return {}


def build(prepared: Prepared) -> Built:
    """Load the base, build the model that trains, and begin the run folder.

    Raises:
        StepladderError: the base cannot be loaded or trained by this recipe, or the folder cannot be written.
    """
    import transformers

    from stepladder.model import attention
    from stepladder.model import build as model_build
    from stepladder.training.launch import weight_sending

    checked, launch, recipe = prepared.checked, prepared.checked.launch, prepared.recipe
    devices.bind_near_gpu(launch)
    transformers.set_seed(prepared.arguments.seed)  # before the adapter draws its first weights
    base = weight_sending.load_base_model(recipe, prepared.precision, launch)
    model = model_build.build(
        base, recipe, prepared.precision,
        lambda it: attention.settle(it, recipe, prepared.precision, prepared.arguments.device.type, ranks.from_first),
        prepared.tokenizer, prepared.new_tokens,
        sharded=launch.strategy.shards, on_cpu=prepared.use_cpu,
    )  # fmt: skip
    if prepared.checkpoint:
        model.notes.extend(attention.note_change(checked.record.manifest.get("attention") or {}, model.attention))
    checked.record.begin(
        checked.recipe.to_yaml(), resume.resumption_entry(prepared.checkpoint), **_facts(prepared, model)
    )
    initial_factors.keep(model.model, checked.record.folder, prepared.checkpoint, checked.record.is_writer)
    fixed_values.share(model.model, ranks.from_first)
    signals.install(trains=True)
    return Built(prepared, base, model)


def _facts(prepared: Prepared, model: BuiltModel) -> dict[str, Any]:
    """What `run.json` records of this start."""
    from stepladder.training import result

    checked, launch, recipe, step = prepared.checked, prepared.checked.launch, prepared.checked.recipe, prepared.step
    rows = [rows for rows in (checked.train_rows, checked.eval_rows) if rows]
    return {
        "recipe_name": recipe.name,
        "recipe": recipe.values,
        "recipe_hash": recipe.hash(),
        "starts_from": start.describe_start(recipe),
        "strategy": launch.strategy,
        "world_size": launch.ranks,
        "devices": prepared.devices,
        "precision": prepared.precision,
        "attention": model.attention.facts_for_manifest(),
        "allocator": devices.allocator_name(),
        "global_batch_size": step.rows,
        "micro_batch_size": step.micro,
        "gradient_accumulation_steps": step.accumulation,
        "max_grad_norm": prepared.arguments.max_grad_norm,
        "seed": prepared.arguments.seed,
        "parameters": result.parameter_counts(model.model),
        "plan": prepared.planned,
        "inputs": checked.inputs.found,
        "datasets": [each.fingerprint() for each in rows] if launch.rank == 0 else [],
    }


def train(built: Built, callback_file: str | None, profile: bool, stop_at: int | None = None) -> Trained:
    """Train and save the result. `run.json` holds the status finished, preempted or failed at its end."""
    from stepladder.training import result
    from stepladder.training.guard import interruptions
    from stepladder.training.watch import telemetry, terminal, trackers

    prepared, checked = built.prepared, built.prepared.checked
    record, train_rows, eval_rows = checked.record, checked.train_rows, checked.eval_rows
    with contextlib.ExitStack() as closing, record.recording():
        _announce(built)
        shapes = result.adapter_shapes(built.model.model)
        watchers = closing.enter_context(trackers.close_at_end(record))
        line = closing.enter_context(contextlib.closing(terminal.ProgressLine()))
        trainer = _trainer(built, callback_file, line, watchers, stop_at)
        if profile and record.is_writer:
            trainer.add_callback(terminal.Profile(record))  # after the meter, which does not count the writing
        peak = prepared.planned.get("peak_memory_bytes")
        with interruptions.explain_out_of_memory(prepared.recipe, checked.launch, prepared.step.micro, peak):
            trainer.train(resume_from_checkpoint=prepared.checkpoint)
        record.update(
            totals=telemetry.totals(trainer.meter, trainer.state.global_step),
            final=telemetry.final_losses(trainer.state),
            result_step=telemetry.result_step(trainer.state),
            **trainer.early_stopping.manifest_entry(),
        )
        if trainer.rank_sync.preempted:
            record.update(status="preempted", reached_stop=trainer.rank_sync.reached_stop)
            trackers.close(watchers, errors.EXIT_PREEMPTED)
            trainer.accelerator.wait_for_everyone()  # a queue ends all nodes when the first one has ended
            console.say(terminal.preemption_message(record))
            return Trained(built, preempted=True)
        result.save(trainer, record, shapes)
        if record.is_writer:
            # Called in reverse order, once run.json has the status finished: first the audit, then the page.
            closing.callback(terminal.write_page, page.write_page, record.folder)
            closing.callback(terminal.write_page, page.write_audit, record.folder, train_rows, eval_rows)
    return Trained(built, preempted=False)


def _announce(built: Built) -> None:
    """Print the run's opening block."""
    from stepladder.planning import choose
    from stepladder.training.watch import terminal

    prepared, checked = built.prepared, built.prepared.checked
    train_set, train_rows, eval_rows = prepared.train_set, checked.train_rows, checked.eval_rows
    notes = prepared.notes + built.model.notes
    notes += mixture.write_held_out(checked.record, train_rows, eval_rows, checked.recipe.foreign_evaluation())
    notes += [prepared.planned["reason"]] if checked.recipe.plans() else []
    notes += train_rows.notes if train_rows else []
    notes += eval_rows.notes if eval_rows and not checked.recipe.get("test_split_size") else []  # else the train set's
    sequences = len(train_set) if hasattr(train_set, "__len__") else None
    steps = choose.steps(prepared.recipe, sequences, prepared.step.rows)
    attends = str(built.model.attention)
    console.say(terminal.opening_block(checked.record, prepared.recipe, steps, sequences, attends, notes))


def _trainer(built: Built, callback_file: str | None, line: Any, watchers: list[Any], stop_at: int | None) -> Trainer:
    """The trainer. Its callbacks: the user's own, the progress line, the watchdog, then `watchers`, which it fills."""
    from stepladder.evaluation import generation
    from stepladder.training import trainer
    from stepladder.training.guard import interruptions
    from stepladder.training.watch import telemetry, trackers

    prepared, checked = built.prepared, built.prepared.checked
    record, launch, recipe = checked.record, checked.launch, checked.recipe
    work = telemetry.model_work(built.base, record.manifest["parameters"], prepared.arguments, prepared.precision)
    meter = telemetry.Telemetry(record, work, launch.local_ranks)
    own = arguments.load_callback(callback_file)
    ask = generation.sample_asker(checked.eval_rows, prepared.tokenizer, launch.strategy, prepared.precision)
    watchers += trackers.create_trackers(record, recipe, prepared.arguments, ask)
    with arguments.raise_as_recipe_errors(recipe):
        return trainer.Trainer(
            model=built.model.model, layout=prepared.step, padding_free=built.model.attention.padding_free,
            own_kernels=prepared.use_cpu, args=prepared.arguments, processing_class=prepared.tokenizer,
            train_dataset=prepared.train_set, eval_dataset=prepared.eval_set, meter=meter,
            watchdog=interruptions.Watchdog(record, recipe.get("hang_timeout"), launch.rank),
            on_nan=recipe.get("on_nan"), loraplus_lr_ratio=recipe.get("loraplus_lr_ratio"), stop_at=stop_at,
            early_stopping=(recipe.get("early_stopping_patience"), recipe.get("early_stopping_threshold")),
            callbacks=[*own, line, *watchers],
        )  # fmt: skip


def finish(trained: Trained) -> int | None:
    """Print the result; returns the exit code: 75 for a run that was preempted, None for one at its end or its stop."""
    from stepladder.training.watch import terminal

    checked = trained.built.prepared.checked
    if trained.preempted:
        return None if checked.record.manifest["reached_stop"] else errors.EXIT_PREEMPTED
    record, rows = checked.record, checked.train_rows
    if record.is_writer and isinstance(rows, Stream) and rows.left_out:
        left_out = list(rows.left_out)
        record.update(rows_left_out=left_out[:LISTED])
        console.say(f"  {len(left_out):,} rows of the stream were skipped, the first at {left_out[0]}")
    console.say(terminal.closing_block(record))
    return None
