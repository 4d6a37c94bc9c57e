"""What check.py prints: everything that can be wrong before a run; or a recipe's keys; or its rows.

Each fault is looked for by itself; what follows from one is not looked at. Above all rooms, since it asks each of
them. torch is imported for the pre-flight only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder import console, hardware, installation, requirements
from stepladder.cluster import staging
from stepladder.data import audit, special_tokens, templates
from stepladder.data.row_checks import UNUSABLE, WARNING, Finding, Limits, check_tokens
from stepladder.data.special_tokens import NewToken
from stepladder.errors import EXIT_BAD_INPUT, LaunchError, RecipeError, StepladderError
from stepladder.model import adapter_recipe, pretrained, start
from stepladder.recipe import explain, rules
from stepladder.recipe import load as recipe_load
from stepladder.recipe.recipe import Recipe
from stepladder.training import arguments
from stepladder.training.launch import devices, launcher, native

SHOW_KEYS = "keys"  # what --show prints where no number follows it


def check(parser: argparse.ArgumentParser) -> int:
    """Print the view that check.py's command line asks for.

    Args:
        parser: check.py's own, which has not read the command line yet.

    Returns:
        The exit code.
    """
    args, overrides = parser.parse_known_args()
    if args.show not in (None, SHOW_KEYS) and not args.show.isdecimal():
        overrides.insert(0, args.show)  # `--show lora`: not a number but the recipe
        args.show = SHOW_KEYS
    count = 0 if args.show in (None, SHOW_KEYS) else int(args.show)
    shows_rows = args.audit or args.show not in (None, SHOW_KEYS)
    # `check.py lora --lora_r 8`: a first word that is no flag is the recipe too.
    bare = not args.recipe and overrides and not overrides[0].startswith("-")
    name = overrides.pop(0) if bare else args.recipe
    if args.data and (name or overrides or shows_rows or args.show):
        parser.error("--data takes no recipe; with a recipe: --recipe NAME --dataset_name FILE --audit, or --show N")
    if (shows_rows or args.data) and (args.explain or args.show == SHOW_KEYS):
        parser.error("--audit and --data take no other view than --show N")
    if not (shows_rows or args.data) and (args.min_input, args.min_output) != (None, None):
        parser.error("--min_input and --min_output need --data, --audit or --show N")
    lengths = {"input": args.min_input, "output": args.min_output}
    limits = Limits(**{key: least for key, least in lengths.items() if least is not None})
    if args.data:
        return _print_findings(audit.audit_source(args.data, limits), [], args.json)
    if name and explain.is_axolotl(recipe_load.find(name)):
        return _print_axolotl(recipe_load.find(name), args, overrides)
    recipe = recipe_load.load(name, overrides)
    if shows_rows:
        return _print_audit(recipe, limits, count, args.json)
    if args.show or args.explain:
        settled = adapter_recipe.settle(recipe) if start.resolve_recipe_model(recipe).adapter else recipe
        return _print_keys(settled, args)
    return _print_checks(recipe, args)


def _print_audit(recipe: Recipe, limits: Limits, count: int, as_json: bool) -> int:
    """What the recipe's rows are as text and, where all can be used, as tokens; the first `count` are shown."""
    found, seen = audit.audit_recipe(recipe, limits), []
    if recipe.foreign_evaluation():
        what = f"{recipe.foreign_evaluation()} is evaluated on, and came with other training data"
        where = [recipe.where("eval_dataset_name")]
        found.findings.append(Finding(WARNING, "foreign_evaluation", what, where, rules.OWN_ROWS))
    if found.train:
        console.quiet_libraries()
        recipe = adapter_recipe.settle(recipe)
        tokenizer = pretrained.load_tokenizer_for(recipe)
        known = special_tokens.known_notes(tokenizer, recipe)
        found.findings += [Finding(WARNING, "known_tokens", note) for note in known]
        new = templates.prepare(tokenizer, recipe)
        of_tokens = check_tokens(found.train, tokenizer, recipe, new=new)
        found.findings += of_tokens
        if found.evaluation:
            found.findings += check_tokens(found.evaluation, tokenizer, recipe, prefix="evaluation ")
        seen = list(audit.view_rows(found.train, tokenizer, recipe, count))
        left_out = {place for finding in of_tokens if finding.name in UNUSABLE for place in finding.where}
        found.train = found.train.take(n for n, where in enumerate(found.train.where) if where not in left_out)
    return _print_findings(found, seen, as_json)


def _print_findings(found: audit.Audit, seen: list, as_json: bool) -> int:
    if as_json:
        print(json.dumps(audit.as_json(found, seen), ensure_ascii=False))
    else:
        audit.print_audit(found, seen)
    return EXIT_BAD_INPUT if found.errors else 0


def _print_keys(recipe: Recipe, args: argparse.Namespace) -> int:
    """Print each key with its origin (`--show`) or its explanation (`--explain`)."""
    entries = explain.of_recipe(recipe)
    unset = explain.defaults(recipe) if args.show else []
    if args.json:
        return _print_json(_facts(recipe), [*entries, *unset])
    explain.write(explain.Table(entries, unset) if args.show else explain.Lesson(entries))
    for note in recipe.notes:
        print(f"note: {note}")
    return 0


def _print_axolotl(path: Path, args: argparse.Namespace, overrides: list[str]) -> int:
    """Explain an Axolotl configuration by its own key names."""
    command = f"{installation.command('import_axolotl')} {console.quote_for_shell(path)} -o recipe.yaml"
    if not args.explain or overrides:
        raise RecipeError(
            "this is an Axolotl configuration" + (f", and {overrides[0]} cannot be set in it" if overrides else ""),
            where=str(path),
            why="its key base_model says so",
            help=f"{command} makes it a recipe; --explain explains it",
        )
    entries = explain.of_axolotl(path)
    if args.json:
        return _print_json({"axolotl": str(path)}, entries)
    explain.write(explain.Lesson(entries, banners=False))
    print(f"\nAn Axolotl configuration; {command} makes it a recipe.")
    return 0


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {"recipe": recipe.name, "path": str(recipe.path), "hash": recipe.hash(), "notes": recipe.notes}


def _print_json(facts: dict[str, Any], entries: list[explain.Entry]) -> int:
    keys = [dataclasses.asdict(entry) for entry in entries]
    print(json.dumps(facts | {"keys": keys}, ensure_ascii=False, default=str))
    return 0


@dataclass(frozen=True)
class Machine:
    """The hardware of a run: `gpus` of type `gpu` per node; None for those of this machine."""

    nodes: int = 1
    gpus: int | None = None
    gpu: str = "h100"
    strategy: str | None = None


@dataclass(frozen=True)
class Check:
    """The result of one check; `where`, `why` and `help` are those of `StepladderError`."""

    name: str
    right: bool
    message: str
    where: str = ""
    why: str = ""
    help: str = ""

    def as_json(self) -> dict[str, Any]:
        """As `check.py --json` prints it."""
        facts = dataclasses.asdict(self)
        return {"said" if name == "message" else name: value for name, value in facts.items()}


def _print_checks(recipe: Recipe, args: argparse.Namespace) -> int:
    """Run all checks and print a line for each, with help for those that fail."""
    console.quiet_libraries()
    with console.quick_imports():
        from stepladder.planning import choose  # noqa: F401 - with torch and all that plans
    found = checks(recipe, Machine(args.nodes, args.gpus, args.gpu, args.strategy))
    exit_code = 0 if all(line.right for line in found) else EXIT_BAD_INPUT
    if args.json:
        lines = [line.as_json() for line in found]
        facts = _facts(recipe) | {"right": exit_code == 0, "checks": lines}
        print(json.dumps(facts, ensure_ascii=False))
        return exit_code
    for line in found:
        place = f"{line.where}: " if line.where else ""
        print(f"{'✔' if line.right else '✘'} {line.name:10}{place}{line.message}")
        for label, text in (("why", line.why), ("help", line.help)):
            if text:
                print(f"            {label + ':':9}" + text.replace("\n", "\n" + " " * 21))
    for note in recipe.notes:
        print(f"note: {note}")
    return exit_code


def checks(recipe: Recipe, machine: Machine) -> list[Check]:
    """Check recipe, versions, accounts, compiler, model, data, template, strategy, memory and disk, in this order."""
    done: list[Check] = []
    if recipe.get("use_cpu") and not machine.gpus:
        devices.hide_gpus()

    def look(name: str, found: Callable[..., tuple[str, Any]], *given: Any) -> Any:
        try:
            message, value = found(*given)
        except StepladderError as error:
            done.append(Check(name, False, error.what, error.where, error.why, error.help))
            return None
        done.append(Check(name, True, message))
        return value

    look("recipe", _keys, recipe)
    look("versions", _required, requirements.versions, recipe)
    look("accounts", _required, requirements.accounts, recipe)
    if recipe.get("torch_compile"):
        look("compiler", _required, requirements.compiler, recipe)
    if os.environ.get(staging.VARIABLE):
        look("stage", _required, staging.check_stage, recipe)
    model = look("model", _model, recipe)
    recipe = model or recipe  # with an adapter's own values
    rows = look("data", _data, recipe)
    tokens = look("template", _template, recipe, rows) if model and rows and rows.train else None
    longest, new = tokens or (None, [])
    launch = look("strategy", _strategy, recipe, machine, new)
    sizes = look("memory", _memory, recipe, machine, launch, longest) if model and launch else None
    if sizes:
        look("disk", _required, requirements.disk, recipe, recipe.output_dir, *sizes)
    return done


def _required(requirement: Callable[..., str], *given: Any) -> tuple[str, Any]:
    return requirement(*given), True


def _keys(recipe: Recipe) -> tuple[str, Any]:
    files = Counter(entry.where.rsplit(":", 2)[0] for entry in explain.of_recipe(recipe) if "." not in entry.key)
    keys = ", ".join(f"{count} from {file}" for file, count in files.items())
    return f"keys: {keys}; each is known, well typed and with an effect", True


def _model(recipe: Recipe) -> tuple[str, Recipe]:
    """The message, and the recipe as it is trained."""
    found = adapter_recipe.settle(recipe)
    source = start.resolve_recipe_model(found)
    on = f", an adapter that is trained on; its base is {source.base}" if source.adapter else ""
    return f"{found.get('model_name_or_path')}{on}", found


def _data(recipe: Recipe) -> tuple[str, audit.Audit]:
    arguments.check_streaming(recipe)
    found = audit.audit_recipe(recipe, Limits(0, 0))  # training refuses no row for being short

    audit.stop_on_errors(found.findings)
    warned = sum(finding.severity == WARNING for finding in found.findings)
    held = f", {len(found.evaluation)} held out" if found.evaluation else ""
    return f"{found.name}: {len(found.train or [])} rows{held}, {warned} warnings (--audit shows all)", found


def _template(recipe: Recipe, rows: audit.Audit) -> tuple[str, tuple[int, list[NewToken]]]:
    """The message, the tokens of the longest row, and which tokens the vocabulary lacked."""
    assert rows.train is not None
    tokenizer = pretrained.load_tokenizer_for(recipe)
    new = templates.prepare(tokenizer, recipe)
    found = check_tokens(rows.train, tokenizer, recipe, new=new)
    audit.stop_on_errors(found)
    figures = {finding.name: finding.figures for finding in found}
    share, most = figures["trained_tokens"]["share"], figures["tokens_per_row"]["max"]
    at_least = "at least " * any(finding.name == "long_text" for finding in found)
    message = f"{at_least}{most} tokens in the longest row; {share:.0%} of all are trained"
    if ends := templates.turn_ends(tokenizer):
        message += f"; an answer ends by {' or '.join(tokenizer.convert_ids_to_tokens(ends))}"
    if new:
        message += f"; {len(new)} new tokens"
    warned = [finding for finding in found if finding.severity == WARNING]
    return message + f"; {len(warned)} warnings (--audit shows all)" * bool(warned), (most, new)


def _strategy(recipe: Recipe, machine: Machine, new: list[NewToken]) -> tuple[str, launcher.Launch]:
    """The message, and the launch that is asked for."""
    gpus = machine.gpus or hardware.gpus_here()
    if not gpus:
        if not recipe.get("use_cpu"):
            devices.assert_no_gpu_named()
        gpus = 1
    name = launcher.find_strategy(machine.strategy, machine.nodes, gpus)
    launch = launcher.Launch(machine.nodes * gpus, 0, 0, gpus, name, machine.nodes if name.is_hsdp else 1)
    step = arguments.layout(recipe, launch.ranks)
    notes = arguments.check_strategy(recipe, launch)
    if not machine.gpus and launch.ranks == 1:  # several ranks on a Mac compute on its CPU
        native.check_device(recipe)
    arguments.check_new_tokens(recipe, launch, new)
    alias = f"{machine.strategy} is " if machine.strategy not in (None, name) else ""
    message = f"{alias}{name} on {launch.ranks} rank{'s' * (launch.ranks > 1)}, {step.rows} rows a step"
    return "; ".join([message, *notes]), launch


def _memory(recipe: Recipe, machine: Machine, launch: launcher.Launch, longest: int | None) -> tuple[str, Any]:
    """The message, and the bytes that go to the disk."""
    from stepladder.planning import choose

    if machine.gpus:
        device = hardware.device(machine.gpu)
        plan = choose.Plan(recipe, machine.nodes, machine.gpus, device, longest)
        pick = plan.of_recipe(launch.strategy)
    else:
        precision, gpu = pretrained.precision(recipe), hardware.accelerator() != "cpu"
        plan, pick = choose.plan_run(recipe, launch, precision, longest, gpu)
    message = f"{pick.gib} of {plan.device.name}: {pick.batch}"
    if pick.host_limit is not None and not pick.host_fits:
        message += (
            f", and {pick.memory.host / hardware.GIB:.1f} of {pick.host_limit / hardware.GIB:.1f} GiB of its host"
        )
    if not pick.fits:
        better = choose.fastest(plan.candidates()) or choose.fastest(plan.all_candidates(launch.strategy))
        if better is None:
            raise choose.no_fit_error(plan, plan.candidates())
        raise LaunchError(f"it needs {message}", help=f"--strategy {better.strategy} {' '.join(better.keys)}")
    return message, plan.sizes(pick)
