"""A sweep: the runs of a grid, all of them or a draw; by halving, in rungs that train the best of the one before on.

    recipe: lora
    strategy: ddp                      # optional
    max_steps: 480                     # any key, the same for all
    random: {runs: 8, seed: 1}         # optional: so many of the grid's combinations, drawn by the seed
    halving: {start: 60, keep: 0.5}    # optional: the first rung stops at step 60, and half of its runs go on
    grid:
      lora_r: [8, 16, 32, 64]

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): each rung stops at 1/keep times as many steps as the
one before it, and the last one at the run's own end. A rung is a stop, not another recipe, so a run that stays has the
curve of one that never stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stepladder import files, installation
from stepladder.data import mixture
from stepladder.errors import LaunchError, RecipeError, RecipeErrors, RunError
from stepladder.manifest import MANIFEST, read_metrics, status
from stepladder.recipe import convert
from stepladder.recipe.recipe import Recipe
from stepladder.recipe.schema import known_keys
from stepladder.training import arguments

OWN = ("recipe", "strategy", "grid", "random", "halving")  # words of a sweep that are no key of its recipe
HELP = "recipe: lora\ngrid:\n  lora_r: [8, 16, 32, 64]"
MOST_RUNS = 100_000  # of a grid, of which a draw may take a few
LENGTH = ("max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Rung:
    """A part of a sweep: so many runs, trained to `stop` (None: to their end), and the `before` of the rung below."""

    number: int
    runs: int
    stop: int | None
    before: int | None


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file has it.

    Attributes:
        runs: the arguments of sft.sbatch for each.
        halving: `start` and `keep`; empty without.
        where: the place of each word in the file.
    """

    file: Path
    runs: list[list[str]]
    halving: dict[str, Any]
    where: dict[str, str]

    @property
    def folders(self) -> list[Path]:
        """The run folder of each run."""
        return [Path(words[words.index("--output_dir") + 1]) for words in self.runs]

    @property
    def folder(self) -> Path:
        return self.folders[0].parent

    def decision(self, rung: int) -> Path:
        """The file that says which runs train on in a rung; another sweep may have the same `output_dir`."""
        return self.folder / f"{self.file.stem}-rung-{rung}.json"

    def split_folders(self) -> tuple[list[Path], list[Path]]:
        """The folders that hold a run, and those that hold none.

        Raises:
            RunError: none does.
        """
        begun = [folder for folder in self.folders if (folder / MANIFEST).is_file()]
        if not begun:
            raise RunError(
                f"no run of {self.file} has begun", help=f"{installation.command('submit')} --sweep {self.file}"
            )
        return begun, [folder for folder in self.folders if folder not in begun]

    def rungs(self, recipe: Recipe) -> list[Rung]:
        """The sweep's parts, one after the other: one without halving.

        Args:
            recipe: of any run, with the keys of the command line.

        Raises:
            RecipeError: a recipe that cannot be stopped and compared at a step.
        """
        count = len(self.runs)
        if not self.halving:
            return [Rung(0, count, None, None)]
        where, last = self.where["halving"], recipe.get("max_steps")
        step, keep = self.halving["start"], self.halving["keep"]
        if last <= step:
            raise RecipeError(
                f"halving starts at step {step}, and max_steps is {last}",
                where=where,
                why="the learning rate follows from the length of the whole run, and a rung is a part of it",
                help=f"max_steps: {8 * step}, or a smaller start",
            )
        if recipe.get("eval_strategy") == "no" or not mixture.name_held_out(recipe):
            raise RecipeError(
                "halving compares held-out losses, and the recipe evaluates nothing",
                where=where,
                help="test_split_size: 0.1, or eval_dataset_name: FILE; with eval_strategy: steps",
            )
        key = "early_stopping_patience"
        if recipe.get(key) or f"grid.{key}" in self.where:
            raise RecipeError(
                f"halving compares runs at the same step, and {key} may end one before it",
                where=self.where.get(f"grid.{key}", where),
                help=f"{key}: null (halving ends the runs that are worse), or no halving",
            )
        if key := self._varies_rows(recipe):
            raise RecipeError(
                f"{key} varies, and with it the held-out rows, so the runs' losses do not compare",
                where=self.where[f"grid.{key}"],
                help="eval_dataset_name: FILE, the same for all; or no halving",
            )
        found: list[Rung] = []
        while count > 1 and step < last:
            arguments.check_stop(recipe, step)
            found.append(Rung(len(found), count, step, found[-1].stop if found else None))
            count, step = max(1, min(count - 1, math.floor(count * keep + 1e-9))), math.ceil(step / keep - 1e-9)
        return [*found, Rung(len(found), count, None, found[-1].stop)]

    def _varies_rows(self, recipe: Recipe) -> str:
        """A key of the grid by which the runs would be evaluated on other rows; empty without one."""
        keys = {"eval_dataset_name", "test_split_size", "dataset_test_split"}
        if not recipe.get("eval_dataset_name"):
            keys |= {"dataset_name", "datasets", "dataset_config"} | (
                {"seed"} if recipe.get("test_split_size") else set()
            )
        return next((key for key in sorted(keys) if f"grid.{key}" in self.where), "")


def read_sweep(file: Path) -> Sweep:
    """A sweep's file.

    Raises:
        RecipeError: the file is no sweep, or two of its runs would be one.
    """
    try:
        text = files.read_text(installation.locate(file), files.YAML_BYTES)
        node, content = files.compose(text), files.parse_yaml(text) or {}
    except (ValueError, yaml.YAMLError) as error:
        why = "" if os.path.lexists(installation.locate(file)) else installation.places(file)
        raise RecipeError(f"not a sweep: {error}", where=str(file), why=why, help=HELP) from None
    faults: list[RecipeError] = []
    pairs = convert.mapping(node, str(file), faults)
    where = {name: convert.position(str(file), key) for name, (key, _) in pairs.items()}
    if "grid" in pairs:
        where |= {f"grid.{name}": convert.position(str(file), key)
                  for name, (key, _) in convert.mapping(pairs["grid"][1], str(file), faults).items()}  # fmt: skip
    for _, block in (pairs[name] for name in ("random", "halving") if name in pairs):
        if isinstance(block, yaml.MappingNode):
            convert.mapping(block, str(file), faults)  # what stands twice
    for name, place in where.items():
        key = name.removeprefix("grid.")
        if name == "grid.output_dir":
            faults.append(RecipeError("each run has a folder of its own, so output_dir does not vary", where=place))
        elif key not in known_keys() and not (name in OWN or name == "grid.strategy"):
            faults.append(convert.unknown_key(key, [*known_keys(), *(OWN if key == name else OWN[1:2])], place))
    if faults:
        raise faults[0] if len(faults) == 1 else RecipeErrors(faults)
    grid = content.get("grid")
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise RecipeError("a sweep has a recipe and a grid: a list of values for each key that varies",
                          where=where.get("grid", str(file)), help=HELP)  # fmt: skip
    if not isinstance(content.get("recipe"), str):
        raise RecipeError("a sweep names its recipe", where=where.get("recipe", str(file)), help="recipe: lora")
    if not isinstance(content.get("output_dir", ""), str):
        raise RecipeError("output_dir is a folder's name", where=where["output_dir"], help="output_dir: runs/ranks")
    if (count := math.prod(map(len, grid.values()))) > MOST_RUNS:
        raise RecipeError(f"the grid has {count:,} combinations", where=where["grid"], help=f"{MOST_RUNS:,} at most")
    for key, values in grid.items():
        if len({_as_read(value) for value in values}) < len(values):
            raise RecipeError(f"{key} has a value twice", where=where[f"grid.{key}"], help="each value once")
    if twice := sorted(set(grid) & set(content)):
        raise RecipeError(f"{', '.join(twice)} is in the grid and beside it", where=where[f"grid.{twice[0]}"])
    runs = _draw(_list_runs(file, content, where), content.get("random"), where.get("random", ""))
    return Sweep(file, runs, _read_halving(content, len(runs), where), where)


def _list_runs(file: Path, content: dict[str, Any], where: dict[str, str]) -> list[list[str]]:
    """The arguments of each combination of the grid."""
    grid, own = content["grid"], ("grid", "output_dir", "random", "halving")
    same = {key: value for key, value in content.items() if key not in own}
    root, runs = Path(os.path.expanduser(content.get("output_dir") or f"runs/{file.stem}")), []
    names: set[str] = set()
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_text(value)}".replace("/", "_") for key, value in varied.items())
        if name in names:
            raise RecipeError(f"two runs of the grid would lie in {name}", where=where["grid"],
                              help="values that differ by more than / and _")  # fmt: skip
        names.add(name)
        keys = {**same, **varied, "output_dir": root / name}
        runs.append([word for key, value in keys.items() for word in (f"--{key}", _text(value))])
    return runs


def _draw(runs: list[list[str]], asked: Any, where: str) -> list[list[str]]:
    """So many of the runs as `random` asks for, in the grid's order; all without it."""
    if asked is None and not where:
        return runs
    block = {"seed": 0, **asked} if isinstance(asked, dict) else {}
    if set(block) != {"runs", "seed"} or any(type(value) is not int for value in block.values()) or block["runs"] < 1:
        help = "random: {runs: 8, seed: 1}"
        raise RecipeError(f"random is {asked!r}, and names a number of runs and a seed", where=where, help=help)
    if block["runs"] > len(runs):
        raise RecipeError(f"random draws {block['runs']} runs, and the grid has {len(runs)}", where=where,
                          help=f"runs: {len(runs)} at most, or more values in the grid")  # fmt: skip
    return [runs[i] for i in sorted(random.Random(block["seed"]).sample(range(len(runs)), block["runs"]))]


def _read_halving(content: dict[str, Any], runs: int, where: dict[str, str]) -> dict[str, Any]:
    if "halving" not in where:
        return {}
    block, place = content["halving"], where["halving"]
    block = {"keep": 0.5, **block} if isinstance(block, dict) else {}
    start, keep = block.get("start"), block.get("keep")
    if set(block) != {"start", "keep"} or type(start) is not int or start < 1 or type(keep) is not float:
        help = "halving: {start: 60, keep: 0.5}"
        raise RecipeError(f"halving is {content['halving']!r}, and names a step and a share", where=place, help=help)
    if not 0.05 <= keep <= 0.9:
        raise RecipeError(f"halving keeps {keep} of its runs", where=place, help="keep: a share from 0.05 to 0.9")
    if runs < 2:
        raise RecipeError("halving needs two runs", where=place, help="more values in the grid, or no halving")
    if length := [key for key in LENGTH if f"grid.{key}" in where]:
        raise RecipeError(f"{length[0]} varies, so a rung would not be the same part of each run",
                          where=where[f"grid.{length[0]}"], help="the same length for all, or no halving")  # fmt: skip
    return block


def _as_read(value: Any) -> str:
    """A value as a recipe reads it: `1e-4`, which is a text in YAML 1.1, is 0.0001 too."""
    try:
        return repr(value if isinstance(value, bool) else float(value))
    except (TypeError, ValueError, OverflowError):
        return repr(value)


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    # in one line, which is a part of the folder's name
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def find_run(sweep: Sweep, rung: Rung, number: int) -> list[str]:
    """The arguments of a rung's run: in the first one the sweep's, later those of the best of the rung before.

    Returns:
        None of them where fewer runs have come that far.

    Raises:
        RecipeError: the rung has no such run.
        LaunchError: no run has come that far.
    """
    if number >= rung.runs:
        raise RecipeError(f"run {number} of {rung.runs}", where=str(sweep.file),
                          help=f"sbatch --array=0-{rung.runs - 1} …")  # fmt: skip
    words = sweep.runs[number]
    if rung.before is not None:
        kept = _choose(sweep, rung)
        if number >= len(kept):
            return []
        names = [folder.name for folder in sweep.folders]
        if kept[number] not in names:
            raise LaunchError(
                f"{sweep.decision(rung.number)} names {kept[number]}, which is no run of {sweep.file}",
                why="the sweep's file was changed since",
                help=f"{installation.command('submit')} --sweep {sweep.file}",
            )
        words = sweep.runs[names.index(kept[number])]
    return [*words, "--stop_at_step", str(rung.stop)] if rung.stop else words


def _choose(sweep: Sweep, rung: Rung) -> list[str]:
    """The names of the runs that go on, the best first; decided once, and written into the sweep's folder.

    A run that fails later, or is wound back to a checkpoint, must not move the others to another place.
    """
    assert rung.before is not None
    decision = sweep.decision(rung.number)
    losses = {folder.name: _loss_at(folder, rung.before) for folder in sweep.folders}
    reached = sorted((loss, name) for name, loss in losses.items() if loss is not None)
    if not reached and not decision.exists():
        raise LaunchError(
            f"no run of {sweep.file} has a held-out loss at step {rung.before}, so none goes on",
            why="\n".join(f"{folder.name}: {status(folder)}" for folder in sweep.folders),
            help=f"their logs in {sweep.folder}",
        )
    content = {"step": rung.before, "kept": [name for _, name in reached[: rung.runs]], "held_out_loss": losses}
    part = decision.with_name(f".{decision.name}.{os.getpid()}{files.PART_SUFFIX}")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    try:
        os.link(part, decision)  # fails where another run has decided
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        part.replace(decision)
    part.unlink(missing_ok=True)
    try:
        return [str(name) for name in files.read_object(decision)["kept"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{decision} cannot be used: {error}", help="remove it, and submit the sweep again") from None


def _loss_at(folder: Path, step: int) -> float | None:
    """A run's held-out loss at a step; None where it has none that is finite."""
    found = None
    for _, row in read_metrics(folder):
        loss = row.get("eval_loss") if row and row["step"] == step else None
        if isinstance(loss, int | float) and math.isfinite(loss):
            found = float(loss)
    return found
