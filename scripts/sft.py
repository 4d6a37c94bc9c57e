"""Train: full fine-tuning, LoRA or QLoRA, as the recipe says.

    python scripts/sft.py --recipe lora
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/sft.py --recipe qlora

Any key of the recipe can be set on the command line: --max_steps 20 --learning_rate=1e-4.
The result lies in output_dir (runs/<recipe>): run.json, metrics.jsonl, recipe.yaml, the model
or adapter. A run that is there already is kept unless --overwrite is given.
"""

import argparse

from stepladder import console, errors, run
from stepladder.data import mixture, stream
from stepladder.model import load as model_load
from stepladder.recipe import load
from stepladder.training import arguments, ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="a path, or a name under recipes/")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    args, overrides = parser.parse_known_args()

    # Whatever can be wrong is found before torch is imported: it takes seconds.
    launch = ranks.launched()
    recipe = load.load(args.recipe, overrides)
    arguments.accumulation(recipe, launch.ranks)
    arguments.check_streaming(recipe)
    train_rows, eval_rows = mixture.load(recipe)
    model_load.check_source(recipe.get("model_name_or_path"), recipe.where("model_name_or_path"))
    record = run.Run(recipe.output_dir, is_writer=launch.rank == 0)
    record.claim(args.overwrite, recipe.where("output_dir"))

    console.quiet_libraries()
    import transformers

    from stepladder.data import audit, audit_tokens, render, templates
    from stepladder.model import adapter
    from stepladder.training import announce, progress, result, telemetry, trainer

    console.quiet_progress_bars()
    use_cpu = ranks.choose_device(launch)
    precision = model_load.precision(recipe)
    training_args = arguments.build(recipe, launch, precision, use_cpu)  # the ranks meet here
    devices = ranks.assert_launch(launch, str(training_args.device))

    tokenizer = model_load.tokenizer(recipe)
    new_tokens = templates.prepare(tokenizer, recipe)
    if isinstance(train_rows, stream.Stream):
        train_set, extra = render.render_stream(train_rows, tokenizer, recipe), [trainer.StreamEpoch(train_rows)]
    else:
        train_set, extra = render.render(train_rows, tokenizer, recipe), []
        audit.stop_on_errors(audit_tokens.check_ends(train_set, train_rows, tokenizer))
    eval_set = render.render(eval_rows, tokenizer, recipe) if eval_rows else None
    transformers.set_seed(training_args.seed)  # before the adapter draws its first weights
    base = model_load.base_model(recipe, precision)
    model_load.fit_embeddings(base, tokenizer)
    model = adapter.attach(base, recipe, new_tokens)

    record.begin(
        recipe.to_yaml(),
        recipe_name=recipe.name,
        recipe=recipe.values,
        recipe_hash=recipe.hash(),
        strategy=launch.strategy,
        world_size=launch.ranks,
        devices=devices,
        precision=precision,
        global_batch_size=arguments.global_batch_size(training_args, launch),
        micro_batch_size=training_args.per_device_train_batch_size,
        gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        seed=training_args.seed,
        parameters=result.parameter_counts(model),
        datasets=[rows.fingerprint() for rows in (train_rows, eval_rows) if rows],
    )
    with record.recording():
        console.say(announce.beginning(record, [*recipe.notes, *train_rows.notes]))
        shapes = result.adapter_shapes(model)
        meter = telemetry.Telemetry(record)
        sft = trainer.Trainer(
            model=model,
            args=training_args,
            processing_class=tokenizer,
            train_dataset=train_set,
            eval_dataset=eval_set,
            callbacks=[meter, progress.Progress(), *extra],
        )
        sft.train()
        record.update(totals=telemetry.totals(meter, sft.state.global_step), final=telemetry.final(sft.state))
        result.save(sft, record, recipe, shapes)
    console.say(announce.ending(record))


if __name__ == "__main__":
    errors.exit_with(main)
