"""Everything that can be wrong before a run, on one screen; or where each value comes from, or what it means.

    python scripts/check.py --recipe lora
    python scripts/check.py --recipe models/llama-3.1-8b/lora --gpus 8 --gpu h100 --strategy zero3
    python scripts/check.py --recipe models/qwen3-8b/lora --show --learning_rate 1e-4
    python scripts/check.py --recipe lora --explain
    python scripts/check.py --explain axolotl.yml
    python scripts/check.py --data data/techco.jsonl
    python scripts/check.py --recipe lora --audit
    python scripts/check.py --recipe lora --show 3

Without a view, the whole pre-flight: versions, recipe, data, model, strategy, memory, disk, accounts;
of this machine, or of the one that --gpus and --gpu name. Any key of the recipe can be set on the
command line, as for sft.py. An Axolotl configuration is explained by its own key names. --audit looks
at the rows that the recipe trains on, as text and as tokens; --show N prints N of them too, the
trained tokens in colour.
Exit code 0: all is right; 2: the errors are printed.
"""

import argparse
import dataclasses
import json

from stepladder import console, errors, flags
from stepladder.data import audit
from stepladder.data.row_checks import UNUSABLE, WARNING, Finding, Limits, check_tokens
from stepladder.model import adapter_recipe, start
from stepladder.recipe import explain, load, rules

KEYS = "keys"  # what --show prints where no number follows it


def main() -> int:
    args, name, overrides = _arguments()
    given = {"input": args.min_input, "output": args.min_output}
    limits = Limits(**{key: least for key, least in given.items() if least is not None})
    if args.data:
        return _report(audit.audit_source(args.data, limits), [], args.json)
    if name and explain.is_axolotl(load.find(name)):
        _axolotl(name, args, overrides)
        return 0
    recipe = load.load(name, overrides)
    if args.audit:
        return _audit(recipe, limits, args.rows, args.json)
    if args.show or args.explain:
        _keys(adapter_recipe.settle(recipe) if start.find_for(recipe).adapter else recipe, args)
        return 0
    return _preflight(recipe, args)


def _arguments() -> tuple[argparse.Namespace, str | None, list[str]]:
    """The flags, the recipe's name, and what sets its keys."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="a path, or a name under recipes/")
    view = parser.add_mutually_exclusive_group()
    shows = "print each key, its value and where it comes from; with a number: audit, and print so many rows"
    view.add_argument("--show", nargs="?", const=KEYS, metavar="N", help=shows)
    view.add_argument("--explain", action="store_true", help="print what each key that is set does")
    parser.add_argument("--audit", action="store_true", help="look at the data of the recipe")
    parser.add_argument("--data", metavar="FILE", help="look at a file, folder or hub data set, without a recipe")
    parser.add_argument(
        "--min_input", "--min-input", type=flags.whole, metavar="N", help="shortest input (10 characters)"
    )
    parser.add_argument(
        "--min_output", "--min-output", type=flags.whole, metavar="N", help="shortest output (20 characters)"
    )
    parser.add_argument("--nodes", type=flags.count, default=1, help="of the machine that it will run on (default: 1)")
    parser.add_argument("--gpus", type=flags.whole, metavar="N", help="of each node (default: what this machine has)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="with --gpus: h100 a100 4090 t4 …")
    parser.add_argument("--strategy", metavar="NAME", help="a file of accelerate_configs/ (default: single or ddp)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    args, overrides = parser.parse_known_args()
    if args.show not in (None, KEYS) and not args.show.isdecimal():
        overrides.insert(0, args.show)  # `--show lora`: not a number but the recipe
        args.show = KEYS
    args.rows = 0 if args.show in (None, KEYS) else int(args.show)
    args.audit = args.audit or args.show not in (None, KEYS)

    # `check.py lora --lora_r 8`: a first word that is no flag is the recipe too.
    bare = not args.recipe and overrides and not overrides[0].startswith("-")
    name = overrides.pop(0) if bare else args.recipe
    if args.data and (name or overrides or args.audit or args.show):
        parser.error("--data goes without a recipe; with one: --recipe NAME --dataset_name FILE --audit, or --show N")
    if (args.audit or args.data) and (args.explain or args.show == KEYS):
        parser.error("--audit and --data go with no other view than --show N")
    if not (args.audit or args.data) and (args.min_input, args.min_output) != (None, None):
        parser.error("--min_input and --min_output go with --data, --audit or --show N")
    return args, name, overrides


def _audit(recipe: load.Recipe, limits: Limits, count: int, as_json: bool) -> int:
    """What the recipe's rows are as text and, where all can be used, as tokens; the first `count` are shown."""
    found, seen = audit.audit_recipe(recipe, limits), []
    if recipe.foreign_evaluation():
        what = f"{recipe.foreign_evaluation()} is evaluated on, and came with other training data"
        where = [recipe.where("eval_dataset_name")]
        found.findings.append(Finding(WARNING, "foreign_evaluation", what, where, rules.OWN_ROWS))
    if found.train:
        console.quiet_libraries()
        from stepladder.data import templates
        from stepladder.model import pretrained

        recipe = adapter_recipe.settle(recipe)
        tokenizer = pretrained.load_tokenizer_for(recipe)
        templates.prepare(tokenizer, recipe)
        of_tokens = check_tokens(found.train, tokenizer, recipe)
        found.findings += of_tokens
        if found.evaluation:
            found.findings += check_tokens(found.evaluation, tokenizer, recipe, prefix="evaluation ")
        seen = list(audit.view_rows(found.train, tokenizer, recipe, count))
        left_out = {place for finding in of_tokens if finding.name in UNUSABLE for place in finding.where}
        found.train = found.train.take(n for n, where in enumerate(found.train.where) if where not in left_out)
    return _report(found, seen, as_json)


def _report(found: audit.Audit, seen: list, as_json: bool) -> int:
    if as_json:
        print(json.dumps(audit.as_json(found, seen), ensure_ascii=False))
    else:
        audit.print_audit(found, seen)
    return errors.EXIT_BAD_INPUT if found.errors else 0


def _preflight(recipe: load.Recipe, args: argparse.Namespace) -> int:
    """A line each, with what helps where something is wrong."""
    console.quiet_libraries()
    with console.quick_imports():
        from stepladder import preflight
    checks = preflight.checks(recipe, preflight.Machine(args.nodes, args.gpus, args.gpu, args.strategy))
    right = all(line.right for line in checks)
    if args.json:
        facts = {"recipe": recipe.name, "path": str(recipe.path), "hash": recipe.hash(), "notes": recipe.notes}
        lines = [dataclasses.asdict(line) for line in checks]
        print(json.dumps(facts | {"right": right, "checks": lines}, ensure_ascii=False))
        return 0 if right else errors.EXIT_BAD_INPUT
    for line in checks:
        place = f"{line.where}: " if line.where else ""
        print(f"{'✔' if line.right else '✘'} {line.name:10}{place}{line.said}")
        for label, text in (("why", line.why), ("help", line.help)):
            if text:
                print(f"            {label + ':':9}" + text.replace("\n", "\n" + " " * 21))
    for note in recipe.notes:
        print(f"note: {note}")
    return 0 if right else errors.EXIT_BAD_INPUT


def _keys(recipe: load.Recipe, args: argparse.Namespace) -> None:
    entries = explain.of_recipe(recipe)
    unset = explain.defaults(recipe) if args.show else []
    if args.json:
        facts = {"recipe": recipe.name, "path": str(recipe.path), "hash": recipe.hash(), "notes": recipe.notes}
        _print_json(facts, [*entries, *unset])
        return
    if args.show:
        explain.write(explain.Table(entries, unset))
    else:
        explain.write(explain.Lesson(entries))
    for note in recipe.notes:
        print(f"note: {note}")


def _axolotl(name: str, args: argparse.Namespace, overrides: list[str]) -> None:
    path = load.find(name)
    command = f"python scripts/import_axolotl.py {console.quoted(path)} -o recipe.yaml"
    if not args.explain or overrides:
        raise errors.RecipeError(
            "this is an Axolotl configuration" + (f", and {overrides[0]} cannot be set in it" if overrides else ""),
            where=str(path),
            why="its key base_model says so",
            help=f"{command} makes it a recipe; --explain explains it",
        )
    entries = explain.of_axolotl(path)
    if args.json:
        _print_json({"axolotl": str(path)}, entries)
        return
    explain.write(explain.Lesson(entries, banners=False))
    print(f"\nAn Axolotl configuration; {command} makes it a recipe.")


def _print_json(facts: dict, entries: list[explain.Entry]) -> None:
    keys = [dataclasses.asdict(entry) for entry in entries]
    print(json.dumps(facts | {"keys": keys}, ensure_ascii=False, default=str))


if __name__ == "__main__":
    errors.exit_with(main)
