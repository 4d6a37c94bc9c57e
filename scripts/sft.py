"""Train by a recipe: full fine-tuning, LoRA or QLoRA.

    python scripts/sft.py --recipe lora
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/sft.py --recipe qlora

Any key of the recipe can be set on the command line: --max_steps 20 --learning_rate=1e-4.
The result is in output_dir (runs/<recipe>): run.json, metrics.jsonl, recipe.yaml, the model
or adapter, report.html, loss.png. Repeat the command to resume an interrupted run from its
newest complete checkpoint. A finished run is kept unless --overwrite is given.
See docs/reliability.md.
"""

from stepladder import errors, flags, session
from stepladder.training.guard import signals


def main() -> int | None:
    signals.install()  # before the slow imports: a signal during the start counts
    parser = flags.parser(__doc__, __file__)
    parser.add_argument("--recipe", help="a path, or a name under recipes/")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    parser.add_argument("--resume", default="auto", metavar="auto|never|CHECKPOINT", help="default: auto")
    parser.add_argument("--allow_change", "--allow-change", action="append", default=[], metavar="KEY",
                        help="a key whose value or content may differ from the resumed run's; repeatable")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="profile two steps, and print their largest costs")
    parser.add_argument("--callback", metavar="FILE", help="a Python file whose class Callback is added to the trainer")
    parser.add_argument("--stop_at_step", "--stop-at-step", type=flags.count, metavar="N",
                        help="evaluate, save and end after step N; without it the same command resumes")  # fmt: skip
    args, overrides = parser.parse_known_args()

    checked = session.check(args, overrides)
    prepared = session.prepare(checked)
    built = session.build(prepared)
    trained = session.train(built, args.callback, args.profile, args.stop_at_step)
    return session.finish(trained)


if __name__ == "__main__":
    errors.exit_with(main, prints_log=True)
