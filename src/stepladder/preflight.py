"""Everything that can be wrong before a run, each looked at by itself; what follows from a fault is not looked at.

Above all rooms, since it asks each of them what it would say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepladder import requirements
from stepladder.data import audit, templates
from stepladder.data.audit import token_checks
from stepladder.errors import LaunchError, StepladderError
from stepladder.model import adapter_recipe, load, start
from stepladder.planning import choose, hardware
from stepladder.recipe import explain
from stepladder.recipe.recipe import Recipe
from stepladder.training import arguments
from stepladder.training.launch import devices, launcher


@dataclass(frozen=True)
class Machine:
    """What a run is to have: `gpus` of each node, of the type `gpu`; None for what this machine has."""

    nodes: int = 1
    gpus: int | None = None
    gpu: str = "h100"
    strategy: str | None = None


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found; `where`, `why` and `help` as `StepladderError` has them."""

    name: str
    right: bool
    said: str
    where: str = ""
    why: str = ""
    help: str = ""


def checks(recipe: Recipe, machine: Machine) -> list[Check]:
    """Of the recipe, versions, accounts, compiler, model, data, template, strategy, memory and disk, in this order."""
    done: list[Check] = []
    if recipe.get("use_cpu") and not machine.gpus:
        devices.hide_gpus()

    def look(name: str, found: Callable[..., tuple[str, Any]], *given: Any) -> Any:
        try:
            said, value = found(*given)
        except StepladderError as error:
            done.append(Check(name, False, error.what, error.where, error.why, error.help))
            return None
        done.append(Check(name, True, said))
        return value

    look("recipe", _keys, recipe)
    look("versions", _required, requirements.versions, recipe)
    look("accounts", _required, requirements.accounts, recipe)
    if recipe.get("torch_compile"):
        look("compiler", _required, requirements.compiler, recipe)
    model = look("model", _model, recipe)
    recipe = model or recipe  # with an adapter's own values
    rows = look("data", _data, recipe)
    longest = look("template", _template, recipe, rows) if model and rows and rows.train else None
    launch = look("strategy", _strategy, recipe, machine)
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
    """With the recipe as it is trained."""
    found = adapter_recipe.settle(recipe)
    source = start.of_recipe(found)
    on = f", an adapter that is trained on; its base is {source.base}" if source.adapter else ""
    return f"{found.get('model_name_or_path')}{on}", found


def _data(recipe: Recipe) -> tuple[str, audit.Audit]:
    arguments.check_streaming(recipe)
    found = audit.of_recipe(recipe, audit.Limits(0, 0))  # training refuses no row for being short

    audit.stop_on_errors(found.findings)
    warned = sum(finding.severity == audit.WARNING for finding in found.findings)
    held = f", {len(found.evaluation)} held out" if found.evaluation else ""
    return f"{found.name}: {len(found.train or [])} rows{held}, {warned} warnings (--audit shows all)", found


def _template(recipe: Recipe, rows: audit.Audit) -> tuple[str, int]:
    """With the tokens of the longest row."""
    assert rows.train is not None
    tokenizer = load.tokenizer(recipe)
    templates.prepare(tokenizer, recipe)
    found = token_checks.check(rows.train, tokenizer, recipe)
    audit.stop_on_errors(found)
    figures = {finding.name: finding.figures for finding in found}
    share, most = figures["trained_tokens"]["share"], figures["tokens_per_row"]["max"]
    said = f"{most} tokens in the longest row; {share:.0%} of all are trained"
    if ends := templates.turn_ends(tokenizer):
        said += f"; an answer ends by {' or '.join(tokenizer.convert_ids_to_tokens(ends))}"
    warned = [finding for finding in found if finding.severity == audit.WARNING]
    return said + f"; {len(warned)} warnings (--audit shows all)" * bool(warned), most


def _strategy(recipe: Recipe, machine: Machine) -> tuple[str, launcher.Launch]:
    """With the launch that is asked for."""
    gpus = machine.gpus or hardware.gpus_here()
    if not gpus:
        devices.assert_no_gpu_named()
        gpus = 1
    name = launcher.find_strategy(machine.strategy, machine.nodes * gpus)
    launch = launcher.Launch(machine.nodes * gpus, 0, 0, gpus, name)
    step = arguments.layout(recipe, launch.ranks)
    notes = arguments.check_strategy(recipe, launch)
    said = f"{name} on {launch.ranks} rank{'s' * (launch.ranks > 1)}, {step.rows} rows a step"
    return "; ".join([said, *notes]), launch


def _memory(recipe: Recipe, machine: Machine, launch: launcher.Launch, longest: int | None) -> tuple[str, Any]:
    """With the bytes that go to the disk."""
    if machine.gpus:
        device = hardware.device(machine.gpu)
        plan = choose.Plan(recipe, machine.nodes, machine.gpus, device, longest)
        way = plan.of_recipe(launch.strategy)
    else:
        precision, gpu = load.precision(recipe), bool(hardware.gpus_here())
        plan, way = choose.of_run(recipe, launch.strategy, launch.ranks, launch.local_ranks, precision, longest, gpu)
    said = f"{way.memory.total / hardware.GIB:.1f} of {way.limit / hardware.GIB:.1f} GiB of {plan.device.name}"
    said += f": micro-batch {way.micro}, checkpointing {'on' if way.checkpointing else 'off'}"
    if way.host_limit is not None and not way.host_fits:
        said += f", and {way.memory.host / hardware.GIB:.1f} of {way.host_limit / hardware.GIB:.1f} GiB of its host"
    if not way.fits:
        better = choose.fastest(plan.ways()) or choose.fastest(plan.each(launch.strategy))
        if better is None:
            raise choose.nowhere(plan, plan.ways())
        micro, checkpointing = better.micro, str(better.checkpointing).lower()
        help = f"--strategy {better.strategy} --per_device_train_batch_size {micro}"
        raise LaunchError(f"it needs {said}", help=f"{help} --gradient_checkpointing {checkpointing}")
    return said, plan.sizes(way)
