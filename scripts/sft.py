"""Train: full fine-tuning, LoRA or QLoRA, as the recipe says.

    python scripts/sft.py --recipe lora
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/sft.py --recipe qlora

Any key of the recipe can be set on the command line: --max_steps 20 --learning_rate=1e-4.
The result lies in output_dir (runs/<recipe>): run.json, metrics.jsonl, recipe.yaml, the model
or adapter. A finished run there is kept unless --overwrite is given.
"""

import argparse

from stepladder import console, errors, run
from stepladder.recipe import load
from stepladder.training import ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="a path, or a name under recipes/")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    args, overrides = parser.parse_known_args()

    # Before anything heavy: is what was asked for right?
    launch = ranks.launched()
    recipe = load.load(args.recipe, overrides)
    output_dir, main_rank = recipe.output_dir, launch.rank == 0

    console.quiet_libraries()
    import transformers

    from stepladder.data import mixture, render
    from stepladder.model import adapter
    from stepladder.model import load as model_load
    from stepladder.training import announce, arguments, result, telemetry, trainer

    console.quiet_progress_bars()
    train_rows, eval_rows = mixture.load(recipe)
    use_cpu = ranks.choose_device(launch)
    precision = model_load.precision(recipe)

    # The ranks meet here; from now on a fault of one is a fault of all.
    training_args = arguments.build(recipe, launch, precision, use_cpu)
    devices = ranks.assert_launch(launch, str(training_args.device))
    if main_rank:
        run.claim(output_dir, args.overwrite, recipe.where("output_dir"))
    record = run.Run(output_dir, is_writer=main_rank)

    tokenizer = model_load.tokenizer(
        recipe.get("model_name_or_path"), recipe.get("trust_remote_code"), recipe.get("model_revision")
    )
    max_length = recipe.get("max_length")
    train_set = render.render(train_rows, tokenizer, max_length)
    eval_set = render.render(eval_rows, tokenizer, max_length) if eval_rows else None
    transformers.set_seed(training_args.seed)  # before the adapter draws its first weights
    model = adapter.attach(model_load.base_model(recipe, precision), recipe)

    facts = {
        "recipe_name": recipe.name,
        "recipe": recipe.values,
        "recipe_hash": recipe.hash(),
        "strategy": launch.strategy,
        "world_size": launch.ranks,
        "devices": devices,
        "precision": precision,
        "global_batch_size": training_args.train_batch_size * training_args.gradient_accumulation_steps * launch.ranks,
        "micro_batch_size": training_args.train_batch_size,
        "gradient_accumulation_steps": training_args.gradient_accumulation_steps,
        "seed": training_args.seed,
        "parameters": result.parameter_counts(model),
        "datasets": [rows.fingerprint() for rows in (train_rows, eval_rows) if rows],
    }
    record.begin(recipe.to_yaml(), **facts)
    with record.recording():
        for note in recipe.notes:
            console.say(f"note: {note}")
        console.say(announce.summary(record))
        shapes = result.adapter_shapes(model)
        meter = telemetry.Telemetry(record)
        sft = trainer.Trainer(
            model=model,
            args=training_args,
            processing_class=tokenizer,
            train_dataset=train_set,
            eval_dataset=eval_set,
            callbacks=[meter],
        )
        sft.train()
        record.update(totals=telemetry.totals(meter, sft.state.global_step), final=telemetry.final(sft.state))
        result.save(sft, record, recipe, shapes)
    console.say(announce.closing(record))


if __name__ == "__main__":
    errors.exit_with(main)
