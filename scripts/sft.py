"""Train: full fine-tuning, LoRA or QLoRA, as the recipe says.

    python scripts/sft.py --recipe lora
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/sft.py --recipe qlora

Any key of the recipe can be set on the command line: --max_steps 20 --learning_rate=1e-4.
The result lies in output_dir (runs/<recipe>): run.json, metrics.jsonl, recipe.yaml, the model
or adapter, report.html, loss.png. The same command again goes on with a run that was interrupted,
from its newest whole checkpoint; one that is finished is kept unless --overwrite is given.
See docs/reliability.md.
"""

import argparse
import contextlib
import dataclasses

from stepladder import console, errors, requirements, run
from stepladder.data import mixture, row_keys, stream, templates
from stepladder.model import adapter_recipe, start
from stepladder.model import load as model_load
from stepladder.recipe import load
from stepladder.reporting import data_audit, page
from stepladder.training import allocator, arguments, inputs
from stepladder.training.checkpoint import resume
from stepladder.training.guard import signals
from stepladder.training.launch import launcher, ranks, strategy


def main() -> int | None:
    signals.install()  # before the slow imports: a signal during the start counts
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="a path, or a name under recipes/")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    parser.add_argument("--resume", default="auto", metavar="auto|never|CHECKPOINT", help="default: auto")
    parser.add_argument("--allow_change", "--allow-change", action="append", default=[], metavar="KEY",
                        help="a key whose value or content may differ from the resumed run's; repeatable")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="record two steps, and say where their time goes")
    parser.add_argument("--callback", metavar="FILE", help="a Python file whose class Callback watches the run too")
    args, overrides = parser.parse_known_args()

    # Whatever can be wrong is found before torch is imported: it takes seconds.
    launch = launcher.launched()
    recipe = load.load(args.recipe, overrides)
    allocator.use_tcmalloc()  # starts anew, so only once the recipe is known to be right
    allocator.let_segments_grow()
    requirements.versions(recipe)
    requirements.accounts(recipe)
    requirements.compiler(recipe)
    recipe = adapter_recipe.settle(recipe)
    step = arguments.layout(recipe, launch.ranks)
    arguments.check_streaming(recipe)
    notes = recipe.notes + strategy.check(recipe, launch)
    reads = launch.local_rank == 0  # one rank a node reads and prepares the rows; the others open what it made
    train_rows, eval_rows = mixture.load(recipe) if reads else mixture.unread(recipe)
    templates.check_path(recipe)
    record = run.Run(recipe.output_dir, is_writer=launch.rank == 0)
    basis = inputs.Inputs(recipe, eval_rows, reads=launch.rank == 0)
    checkpoint = resume.claim(record, recipe, args.resume, args.overwrite, args.allow_change, basis)

    console.quiet_libraries()
    with console.quick_imports():
        use_cpu = ranks.choose_device(launch, recipe.get("use_cpu"))  # before a library touches CUDA
        import transformers

        from stepladder.data import prepare
        from stepladder.evaluation import samples
        from stepladder.model import attention, build
        from stepladder.planning import choose
        from stepladder.training import callback, result, trainer
        from stepladder.training.guard import out_of_memory, watchdog
        from stepladder.training.launch import one_copy
        from stepladder.training.watch import announce, profiling, progress, telemetry, trackers, utilization

    console.quiet_progress_bars()
    precision = model_load.precision(recipe)
    notes += [f"{key}: true changes nothing on a CPU" for key in arguments.GPU_ONLY if use_cpu and recipe.get(key)]
    notes += launcher.leave_to_recipe(precision, step.accumulation, recipe.get("max_grad_norm"))
    with ranks.meeting(launch):
        training_args = arguments.build(recipe, step, precision, use_cpu, launch.strategy)
    devices = ranks.assert_launch(launch, str(training_args.device))
    ranks.shard_on_cpu(launch)
    checkpoint, record.forgets_best = ranks.from_first((checkpoint, record.forgets_best))

    tokenizer = model_load.tokenizer(recipe)
    own_template = tokenizer.chat_template
    basis.add_tokenizer(tokenizer)
    new_tokens = templates.prepare(tokenizer, recipe)
    basis.add_template(tokenizer)
    notes += start.template_notes(recipe, own_template, tokenizer.chat_template)
    folder = ranks.one_a_node(launch, lambda: prepare.prepared(train_rows, eval_rows, tokenizer, recipe))
    train_set, eval_set = prepare.opened(folder)
    if launch.rank == 0:
        notes += basis.notes
        notes += prepare.remarked(folder, train_rows, eval_rows)
    if isinstance(train_rows, stream.Stream):  # each rank reads it for itself
        notes += prepare.stream_notes(train_rows, tokenizer, recipe) if launch.rank == 0 else []
        train_set = prepare.streamed(train_rows, tokenizer, recipe)
    planned, unplanned = {}, []
    if launch.rank == 0:
        longest = min(filter(None, (recipe.get("max_length"), prepare.longest(train_set))), default=None)
        try:
            plan, way = choose.of_run(
                recipe, launch.strategy, launch.ranks, launch.local_ranks, precision, longest, gpu=not use_cpu
            )
            planned = choose.of_manifest(plan, way)
            requirements.disk(recipe, record.folder, *plan.sizes(way), record.replaced_bytes())
        except errors.ModelError as error:
            if recipe.plans():
                raise
            unplanned = [f"no plan: {error.what}"]
    if recipe.plans():  # `auto`: the plan cuts the global batch
        planned = ranks.from_first(planned)
        settled = recipe.with_values(**{key: planned["chosen"][key] for key in recipe.plans()})
        step = arguments.layout(settled, launch.ranks)
        training_args = arguments.build(settled, step, precision, use_cpu, launch.strategy)
        unplanned = [planned["reason"]]
    else:
        settled = recipe
    transformers.set_seed(training_args.seed)  # before the adapter draws its first weights
    base = one_copy.base_model(recipe, precision, launch)
    built = build.build(
        base, settled, precision,
        lambda base: attention.settle(base, settled, precision, training_args.device.type, ranks.from_first),
        tokenizer, new_tokens, sharded=launch.strategy not in ("single", "ddp"),
    )  # fmt: skip
    model, attends = built.model, built.attention
    notes += built.notes
    notes += attention.changed(record.manifest.get("attention") or {}, attends) if checkpoint else []

    record.begin(
        recipe.to_yaml(),
        resume.entry(checkpoint),
        recipe_name=recipe.name,
        recipe=recipe.values,
        recipe_hash=recipe.hash(),
        starts_from=start.facts(recipe),
        strategy=launch.strategy,
        world_size=launch.ranks,
        devices=devices,
        precision=precision,
        attention=dataclasses.asdict(attends),
        allocator=allocator.name(),
        global_batch_size=step.rows,
        micro_batch_size=step.micro,
        gradient_accumulation_steps=step.accumulation,
        max_grad_norm=training_args.max_grad_norm,
        seed=training_args.seed,
        parameters=result.parameter_counts(model),
        plan=planned,
        inputs=basis.found,
        datasets=[rows.fingerprint() for rows in (train_rows, eval_rows) if rows] if launch.rank == 0 else [],
    )
    signals.install(trains=True)
    with contextlib.ExitStack() as at_the_end, record.recording():
        notes += row_keys.keep(record, train_rows, eval_rows, recipe.foreign_evaluation())
        sequences = len(train_set) if hasattr(train_set, "__len__") else None
        steps = choose.steps(settled, sequences, step.rows)
        notes += unplanned + (train_rows.notes if train_rows else [])
        notes += eval_rows.notes if eval_rows and not recipe.get("test_split_size") else []  # else the training set's
        console.say(announce.beginning(record, settled, steps, sequences, str(attends), notes))
        shapes = result.adapter_shapes(model)
        work = utilization.work(base, record.manifest["parameters"], training_args, precision)
        meter = telemetry.Telemetry(record, work, launch.local_ranks)
        own = callback.of(args.callback)
        ask = samples.asker(eval_rows, tokenizer, launch.strategy, precision)
        told = at_the_end.enter_context(trackers.closing(record))
        told += trackers.of(record, recipe, training_args, ask)
        line = at_the_end.enter_context(contextlib.closing(progress.ProgressLine()))
        watch = watchdog.Watchdog(record, recipe.get("hang_timeout"), launch.rank)
        with arguments.refused(recipe):
            sft = trainer.Trainer(
                model=model,
                layout=step,
                flat=attends.flat,
                own_kernels=use_cpu,
                args=training_args,
                processing_class=tokenizer,
                train_dataset=train_set,
                eval_dataset=eval_set,
                meter=meter,
                on_nan=recipe.get("on_nan"),
                callbacks=[*own, line, watch, *told],
            )
        if args.profile and record.is_writer:
            sft.add_callback(profiling.Profile(record))  # after the meter, which does not count the writing
        with out_of_memory.explained(settled, launch, step.micro, planned.get("peak_memory_bytes")):
            sft.train(resume_from_checkpoint=checkpoint)
        record.update(
            totals=telemetry.totals(meter, sft.state.global_step),
            final=telemetry.final(sft.state),
            result_step=telemetry.result_step(sft.state),
        )
        if sft.agreement.preempted:
            record.update(status="preempted")
            trackers.close(told, errors.EXIT_PREEMPTED)
            sft.accelerator.wait_for_everyone()  # a queue ends all nodes with the first that has ended
            console.say(announce.preempted(record))
            return errors.EXIT_PREEMPTED
        result.save(sft, record, recipe, shapes)
        if record.is_writer:
            # Once run.json says that it is finished; the audit before the page, so it comes last.
            at_the_end.callback(announce.written_beside, page.write, record.folder)
            at_the_end.callback(announce.written_beside, data_audit.write, record.folder, train_rows, eval_rows)
    if record.is_writer and isinstance(train_rows, stream.Stream) and train_rows.left_out:
        left_out = list(train_rows.left_out)
        record.update(rows_left_out=left_out)
        console.say(f"  {len(left_out):,} rows of the stream were skipped, the first at {left_out[0]}")
    console.say(announce.ending(record))
    return None


if __name__ == "__main__":
    errors.exit_with(main, prints_log=True)
