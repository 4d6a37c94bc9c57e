"""A training run, in the one order that its parts can come in: check, prepare, build, train, finish.

`check` answers a user's mistake in a tenth of a second, so it runs before PyTorch is imported; only what it has found
right may restart the process under another allocator. `prepare` imports the libraries, after the device is chosen,
since CUDA reads its environment once. The ranks meet there: from then on each of them takes the same way through this
module, or all would wait for the one that does not. `build` draws the adapter's first weights, after the seed is set.
The run folder begins last of all that can fail, so that a start that fails leaves an older run as it was. `train` keeps
what happens in `run.json`; `finish` says how it ended.

Each stage returns a frozen value, which the next one takes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepladder import console, errors, requirements
from stepladder.data import mixture, row_keys, stream, templates
from stepladder.model import adapter_recipe, start
from stepladder.model import load as model_load
from stepladder.recipe import load
from stepladder.recipe.recipe import Layout, Recipe
from stepladder.reporting import data_audit, page
from stepladder.run import Run
from stepladder.training import allocator, arguments, inputs
from stepladder.training.checkpoint import resume
from stepladder.training.guard import signals
from stepladder.training.launch import launcher, ranks, strategy

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from stepladder.data.rows import Rows
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
    step: Layout
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
    step: Layout
    checkpoint: Path | None
    use_cpu: bool
    precision: str
    devices: list[str]
    arguments: Any
    tokenizer: PreTrainedTokenizerBase
    new_tokens: list[str]
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
    """Whatever can be wrong, before PyTorch is imported: recipe, versions, data, launch, run folder.

    Raises:
        StepladderError: what is wrong, why, and what helps.
    """
    launch = launcher.launched()
    recipe = load.load(args.recipe, overrides)
    allocator.use_tcmalloc()  # it restarts the process, so only once the recipe is known to be right
    allocator.let_segments_grow()
    requirements.versions(recipe)
    requirements.accounts(recipe)
    requirements.compiler(recipe)
    recipe = adapter_recipe.settle(recipe)
    step = arguments.layout(recipe, launch.ranks)
    arguments.check_streaming(recipe)
    notes = requirements.untested_versions() + recipe.notes + strategy.check(recipe, launch)
    # One rank per node reads and prepares the rows; the others open what it made.
    train_rows, eval_rows = mixture.load(recipe) if launch.local_rank == 0 else mixture.unread(recipe)
    templates.check_path(recipe)
    record = Run(recipe.output_dir, is_writer=launch.rank == 0)
    basis = inputs.Inputs(recipe, eval_rows, reads=launch.rank == 0)
    checkpoint = resume.claim(record, recipe, args.resume, args.overwrite, args.allow_change, basis)
    return Checked(launch, recipe, step, train_rows, eval_rows, record, basis, checkpoint, notes)


def prepare(checked: Checked) -> Prepared:
    """Import the libraries, let the ranks meet, tokenize the rows once per node, and plan the memory.

    Raises:
        StepladderError: the launch is not what it was asked for, a row or the template cannot be used, or it does
            not fit.
    """
    launch, recipe, record = checked.launch, checked.recipe, checked.record
    console.quiet_libraries()
    with console.quick_imports():
        use_cpu = ranks.choose_device(launch, recipe.get("use_cpu"))  # before a library touches CUDA
        import_libraries()
    console.quiet_progress_bars()
    precision = model_load.precision(recipe)
    notes = checked.notes + [
        f"{key}: true changes nothing on a CPU" for key in arguments.GPU_ONLY if use_cpu and recipe.get(key)
    ]
    notes += launcher.leave_to_recipe(precision, checked.step.accumulation, recipe.get("max_grad_norm"))
    with ranks.meeting(launch):
        training_args = arguments.build(recipe, checked.step, precision, use_cpu, launch.strategy)
    devices = ranks.assert_launch(launch, str(training_args.device))
    ranks.shard_on_cpu(launch)
    checkpoint, record.forgets_best = ranks.from_first((checked.checkpoint, record.forgets_best))
    tokenizer, new_tokens = _prepare_tokenizer(checked, notes)
    train_set, eval_set = _prepare_rows(checked, tokenizer, notes)
    planned = _plan(checked, train_set, precision, use_cpu, notes) if launch.rank == 0 else {}
    step = checked.step
    if recipe.plans():  # `auto`: the plan cuts the global batch
        planned = ranks.from_first(planned)
        recipe = recipe.with_values(**{key: planned["chosen"][key] for key in recipe.plans()})
        step = arguments.layout(recipe, launch.ranks)
        training_args = arguments.build(recipe, step, precision, use_cpu, launch.strategy)
    return Prepared(
        checked, recipe, step, checkpoint, use_cpu, precision, devices, training_args, tokenizer, new_tokens,
        train_set, eval_set, planned, notes,
    )  # fmt: skip


def import_libraries() -> None:
    """What the following stages use: imported together, while nothing else prints (`console.quick_imports`)."""
    import transformers  # noqa: F401

    from stepladder.data import prepare  # noqa: F401
    from stepladder.evaluation import samples  # noqa: F401
    from stepladder.model import build  # noqa: F401
    from stepladder.planning import choose  # noqa: F401
    from stepladder.training import callback, result, trainer  # noqa: F401
    from stepladder.training.guard import out_of_memory, watchdog  # noqa: F401
    from stepladder.training.launch import one_copy  # noqa: F401
    from stepladder.training.watch import announce, profiling, progress, telemetry, trackers  # noqa: F401


def _prepare_tokenizer(checked: Checked, notes: list[str]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer with the recipe's template, and the tokens that it adds; both are held against a resumed run's."""
    tokenizer = model_load.tokenizer(checked.recipe)
    own_template = tokenizer.chat_template
    checked.inputs.add_tokenizer(tokenizer)
    new_tokens = templates.prepare(tokenizer, checked.recipe)
    checked.inputs.add_template(tokenizer)
    notes += start.template_notes(checked.recipe, own_template, tokenizer.chat_template)
    return tokenizer, new_tokens


def _prepare_rows(checked: Checked, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> tuple[Any, Any]:
    """The rows as tokens, for training and evaluation."""
    from stepladder.data import prepare

    launch, train_rows, eval_rows = checked.launch, checked.train_rows, checked.eval_rows
    folder = ranks.one_a_node(launch, lambda: prepare.prepared(train_rows, eval_rows, tokenizer, checked.recipe))
    train_set, eval_set = prepare.opened(folder)
    if launch.rank == 0:
        notes += checked.inputs.notes
        notes += prepare.remarked(folder, train_rows, eval_rows)
    if isinstance(train_rows, stream.Stream):  # each rank reads it for itself
        notes += prepare.stream_notes(train_rows, tokenizer, checked.recipe) if launch.rank == 0 else []
        train_set = prepare.streamed(train_rows, tokenizer, checked.recipe)
    return train_set, eval_set


def _plan(checked: Checked, train_set: Any, precision: str, use_cpu: bool, notes: list[str]) -> dict[str, Any]:
    """The plan as `run.json` holds it, or a note why there is none. The files that it foresees must have room.

    Raises:
        ModelError: `auto` needs a plan, and there is none.
        LaunchError: the disk is too small.
    """
    from stepladder.data import prepare
    from stepladder.planning import choose

    launch, recipe, record = checked.launch, checked.recipe, checked.record
    longest = min(filter(None, (recipe.get("max_length"), prepare.longest(train_set))), default=None)
    try:
        plan, way = choose.of_run(
            recipe, launch.strategy, launch.ranks, launch.local_ranks, precision, longest, gpu=not use_cpu
        )
        requirements.disk(recipe, record.folder, *plan.sizes(way), record.replaced_bytes())
        return choose.of_manifest(plan, way)
    except errors.ModelError as error:
        if recipe.plans():
            raise
        notes.append(f"no plan: {error.what}")
        return {}


def build(prepared: Prepared) -> Built:
    """Load the base, make it the model that trains, and begin the run folder.

    Raises:
        StepladderError: the base cannot be loaded or trained so, or the folder cannot be written.
    """
    import transformers

    from stepladder.model import attention
    from stepladder.model import build as model_build
    from stepladder.training.launch import one_copy

    checked, launch, recipe = prepared.checked, prepared.checked.launch, prepared.recipe
    device = prepared.arguments.device.type
    transformers.set_seed(prepared.arguments.seed)  # before the adapter draws its first weights
    base = one_copy.base_model(recipe, prepared.precision, launch)
    model = model_build.build(
        base, recipe, prepared.precision,
        lambda base: attention.settle(base, recipe, prepared.precision, device, ranks.from_first),
        prepared.tokenizer, prepared.new_tokens,
        sharded=launch.strategy not in ("single", "ddp"), on_cpu=prepared.use_cpu,
    )  # fmt: skip
    if prepared.checkpoint:
        model.notes.extend(attention.changed(checked.record.manifest.get("attention") or {}, model.attention))
    checked.record.begin(checked.recipe.to_yaml(), resume.entry(prepared.checkpoint), **_facts(prepared, model))
    signals.install(trains=True)
    return Built(prepared, base, model)


def _facts(prepared: Prepared, model: BuiltModel) -> dict[str, Any]:
    """Of this start, for `run.json`."""
    from stepladder.training import result

    checked, launch, recipe, step = prepared.checked, prepared.checked.launch, prepared.checked.recipe, prepared.step
    rows = [rows for rows in (checked.train_rows, checked.eval_rows) if rows]
    return {
        "recipe_name": recipe.name,
        "recipe": recipe.values,
        "recipe_hash": recipe.hash(),
        "starts_from": start.facts(recipe),
        "strategy": launch.strategy,
        "world_size": launch.ranks,
        "devices": prepared.devices,
        "precision": prepared.precision,
        "attention": dataclasses.asdict(model.attention),
        "allocator": allocator.name(),
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


def train(built: Built, callback_file: str | None, profile: bool) -> Trained:
    """Train and save the result. run.json says finished, preempted or failed when this returns or raises."""
    from stepladder.training import result
    from stepladder.training.guard import out_of_memory
    from stepladder.training.watch import announce, profiling, progress, telemetry, trackers

    prepared, checked = built.prepared, built.prepared.checked
    record, train_rows, eval_rows = checked.record, checked.train_rows, checked.eval_rows
    with contextlib.ExitStack() as closing, record.recording():
        _announce(built)
        shapes = result.adapter_shapes(built.model.model)
        watchers = closing.enter_context(trackers.closing(record))
        line = closing.enter_context(contextlib.closing(progress.ProgressLine()))
        trainer = _trainer(built, callback_file, line, watchers)
        if profile and record.is_writer:
            trainer.add_callback(profiling.Profile(record))  # after the meter, which does not count the writing
        peak = prepared.planned.get("peak_memory_bytes")
        with out_of_memory.explained(prepared.recipe, checked.launch, prepared.step.micro, peak):
            trainer.train(resume_from_checkpoint=prepared.checkpoint)
        record.update(
            totals=telemetry.totals(trainer.meter, trainer.state.global_step),
            final=telemetry.final(trainer.state),
            result_step=telemetry.result_step(trainer.state),
        )
        if trainer.agreement.preempted:
            record.update(status="preempted")
            trackers.close(watchers, errors.EXIT_PREEMPTED)
            trainer.accelerator.wait_for_everyone()  # a queue ends all nodes with the first that has ended
            console.say(announce.preempted(record))
            return Trained(built, preempted=True)
        result.save(trainer, record, checked.recipe, shapes)
        if record.is_writer:
            # Once run.json says that it is finished; the audit before the page, so it comes last.
            closing.callback(announce.written_beside, page.write, record.folder)
            closing.callback(announce.written_beside, data_audit.write, record.folder, train_rows, eval_rows)
    return Trained(built, preempted=False)


def _announce(built: Built) -> None:
    """The run's opening lines."""
    from stepladder.planning import choose
    from stepladder.training.watch import announce

    prepared, checked = built.prepared, built.prepared.checked
    train_set, train_rows, eval_rows = prepared.train_set, checked.train_rows, checked.eval_rows
    notes = prepared.notes + built.model.notes
    notes += row_keys.keep(checked.record, train_rows, eval_rows, checked.recipe.foreign_evaluation())
    notes += [prepared.planned["reason"]] if checked.recipe.plans() else []
    notes += train_rows.notes if train_rows else []
    notes += eval_rows.notes if eval_rows and not checked.recipe.get("test_split_size") else []  # else the train set's
    sequences = len(train_set) if hasattr(train_set, "__len__") else None
    steps = choose.steps(prepared.recipe, sequences, prepared.step.rows)
    attends = str(built.model.attention)
    console.say(announce.beginning(checked.record, prepared.recipe, steps, sequences, attends, notes))


def _trainer(built: Built, callback_file: str | None, line: Any, watchers: list[Any]) -> Trainer:
    """The trainer. Its callbacks: the user's own, the progress line, the watchdog, then `watchers`, which it fills."""
    from stepladder.evaluation import samples
    from stepladder.training import callback, trainer
    from stepladder.training.guard import watchdog
    from stepladder.training.watch import telemetry, trackers, utilization

    prepared, checked = built.prepared, built.prepared.checked
    record, launch, recipe = checked.record, checked.launch, checked.recipe
    work = utilization.work(built.base, record.manifest["parameters"], prepared.arguments, prepared.precision)
    meter = telemetry.Telemetry(record, work, launch.local_ranks)
    own = callback.of(callback_file)
    ask = samples.asker(checked.eval_rows, prepared.tokenizer, launch.strategy, prepared.precision)
    watchers += trackers.of(record, recipe, prepared.arguments, ask)
    watch = watchdog.Watchdog(record, recipe.get("hang_timeout"), launch.rank)
    with arguments.refused(recipe):
        return trainer.Trainer(
            model=built.model.model,
            layout=prepared.step,
            flat=built.model.attention.flat,
            own_kernels=prepared.use_cpu,
            args=prepared.arguments,
            processing_class=prepared.tokenizer,
            train_dataset=prepared.train_set,
            eval_dataset=prepared.eval_set,
            meter=meter,
            on_nan=recipe.get("on_nan"),
            callbacks=[*own, line, watch, *watchers],
        )


def finish(trained: Trained) -> int | None:
    """Say what came out of it.

    Returns:
        The exit code: None when the run is finished, 75 when it was preempted after a complete checkpoint.
    """
    from stepladder.training.watch import announce

    if trained.preempted:
        return errors.EXIT_PREEMPTED
    checked = trained.built.prepared.checked
    record, rows = checked.record, checked.train_rows
    if record.is_writer and isinstance(rows, stream.Stream) and rows.left_out:
        left_out = list(rows.left_out)
        record.update(rows_left_out=left_out)
        console.say(f"  {len(left_out):,} rows of the stream were skipped, the first at {left_out[0]}")
    console.say(announce.ending(record))
    return None
