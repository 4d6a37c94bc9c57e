"""What the next start of a run does: begin, resume from the newest complete checkpoint, or fail with a reason.

Rank 0 decides it before torch is imported, by files and JSON alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stepladder.console import say
from stepladder.errors import CheckpointError, LaunchError, StepladderError
from stepladder.files import hash_file, read_object, remove
from stepladder.manifest import MANIFEST, METRICS, STUCK_AFTER, status
from stepladder.model import start
from stepladder.recipe.recipe import BY_METRIC, Recipe
from stepladder.run import Run
from stepladder.training.checkpoint import longer
from stepladder.training.inputs import EVALUATION, Inputs

COMPLETE, TRAINER_STATE, STATE = "COMPLETE.json", "trainer_state.json", "state.json"
READ_KEYS = ("model_name_or_path", "dataset_name", "datasets", "eval_dataset_name", "chat_template_path")
HASHED_AT_ONCE = 8  # files of a checkpoint: hashlib lets other threads run
ASIDE = ".partial"  # at the end of a checkpoint's name: it is not resumed from
OF_THE_CHOICE = {"metric_for_best_model", "greater_is_better"}
OF_THE_RATE = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", *OF_THE_CHOICE}  # of one by a metric
WITHOUT_BEST = (
    "put it back from a copy; or end with the last step: "
    "--load_best_model_at_end false --allow_change load_best_model_at_end"
)


class Finished(StepladderError):
    """The run is finished already, which is no error."""

    exit_code = 0

    def render(self) -> str:
        return f"✔ {self.what}"


def check_unreached(run: Run, recipe: Recipe, step: int | None) -> None:
    """Raise Finished, on every rank, where the run was stopped at `--stop_at_step` already: its job is queued again."""
    before = run.read() if step and status(run.folder) == "preempted" else {}
    steps = before.get("totals", {}).get("steps", 0)
    if step and steps >= step + (not before.get("reached_stop")) and not recipe.changes(before["recipe"]):
        raise Finished(f"the run in {run.folder} has reached step {steps} already")


def of_step(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for any other name (`checkpoint-08`, one that was set aside)."""
    found = re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,17})", checkpoint.name)
    return int(found[1]) if found else None


def whole_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are complete, in order."""
    steps = [step_of(file.parent) for file in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(step for step in steps if step is not None)


def claim(
    run: Run, recipe: Recipe, resume: str, overwrite: bool, allowed: list[str], inputs: Inputs | None = None
) -> Path | None:
    """Take the run folder for this start.

    Args:
        resume: `auto`, `never`, or a checkpoint of this run folder.
        overwrite: whether to replace an existing run.
        allowed: keys of the curve that may differ from the run's recipe, in their values or the files they name.
        inputs: of this start; compared with those of a run that is resumed.

    Returns:
        The checkpoint to resume from; None for a run from its beginning, and on other ranks than 0.

    Raises:
        LaunchError: the folder is not a run's, or its run is finished, in use, stuck, or of another recipe or inputs.
        CheckpointError: there are checkpoints and none of them is complete.
        Finished: this job was queued again after it had finished the run; raised on every rank, so that none waits.
    """
    if run.is_requeued() and status(run.folder) == "finished" and not recipe.changes(run.read()["recipe"]):
        raise Finished(f"the run in {run.folder} is finished: this job was queued again after its end")
    if not run.is_writer:
        return None
    run.lock()
    run.put_back()
    if (overwrite or resume != "auto") and run.is_requeued():
        say("this job was queued again: it resumes its run, without --overwrite and with --resume auto")
        resume, overwrite = "auto", False
    folder, where = run.folder, recipe.where("output_dir")
    if os.path.lexists(folder / METRICS) and not os.path.isfile(folder / METRICS) and not overwrite:
        raise LaunchError(f"{folder / METRICS} is no file", where=where, help="remove it, or another --output_dir")
    if not overwrite:
        _rebuild_manifest(run)
    if not run.exists(where) or overwrite:
        if resume not in ("auto", "never"):
            raise _no_checkpoint_of(Path(resume), folder)
        run.replaces = run.exists(where)
        if run.replaces:
            _check_reads(recipe, folder)
        return None
    return _resume(run, recipe, resume, [key.replace("-", "_") for key in allowed], inputs)


def _resume(run: Run, recipe: Recipe, resume: str, allowed: list[str], inputs: Inputs | None) -> Path | None:
    """Continue the run in the folder; returns its checkpoint, None where it has none yet. Raises as `claim` does."""
    folder, where, before = run.folder, recipe.where("output_dir"), run.read()
    changes = recipe.changes(before["recipe"])
    finished = before["status"] == "finished"
    if (finished and not changes.keys() & {*longer.TRAINS_ON}) or resume == "never":
        raise LaunchError(
            f"output_dir {folder} holds a run ({status(folder)})",
            where=where,
            why="nothing that existed is overwritten",
            help="another --output_dir, or --overwrite to replace that run"
            + (f"; a larger {longer.describe_keys(before)} trains it on" if finished else ""),
        )
    _check_recipe(recipe, before["recipe"], [*allowed, *(longer.TRAINS_ON if finished else [])], where)
    if inputs and whole_steps(folder):
        inputs.resume(before, allowed, folder)
    chosen = None if resume == "auto" else Path(resume)
    found = _check_chosen(chosen, folder) if chosen else newest_whole(folder)
    if finished:
        _check_longer(recipe, folder, found)
    if found and (why := _outdated_best(found, before, recipe, inputs)):
        run.forgets_best = True
        say(f"⚠ the best step so far was chosen by {why}: it is chosen again from the evaluations after {found.name}")
    elif found and recipe.get("load_best_model_at_end"):
        _check_best(found)
    step = (found and step_of(found)) or 0
    starts = 1 if chosen or before.get("progress", {}).get("step") != step else before["progress"]["starts"] + 1
    if starts > STUCK_AFTER:
        run.manifest = {**before, "status": "stuck"}
        run.update()
        raise LaunchError(
            f"the run in {folder} makes no progress: {STUCK_AFTER} starts in a row came no further than step {step}",
            where=where,
            why=f"the last of them ended with: {before.get('error') or 'nothing said (killed, perhaps)'}",
            help=f"mend that, then --resume {of_step(folder, step)}" if found else "mend that, then --overwrite",
        )
    if found is None:
        say(f"the run in {folder} ended before its first checkpoint: it starts from the beginning")
        run.clear(but=METRICS)  # by which trackers know the steps that they have
    else:
        _set_aside(folder, step)
    run.manifest = {**before, "progress": {"step": step, "starts": starts}}
    if found is None:
        run.update()  # keeps the count of starts and the run's id in W&B if this start ends before it trains
    run.allowed = allowed
    run.changes = {key: list(values) for key, values in changes.items()}
    return found


def _check_longer(recipe: Recipe, folder: Path, last: Path | None) -> None:
    """Raise LaunchError where a finished run cannot be trained on, or is not asked for more than it has."""
    longer.check_kept(last, recipe, folder)
    assert last is not None
    counters = read_object(last / STATE) if (last / STATE).is_file() else {}
    longer.check_longer(recipe, folder, read_object(last / TRAINER_STATE), counters)
    say(f"the run in {folder} is finished: it is trained on from {last.name}")


def _check_reads(recipe: Recipe, replaced: Path) -> None:
    """Raise LaunchError where the new run reads a file of the run that it replaces, by whatever links."""
    read = {key: _strings(recipe.values.get(key)) for key in READ_KEYS}
    read[start.MODEL_KEY].append(start.resolve_recipe_model(recipe).base)  # an adapter's own base is read too
    for key, paths in read.items():
        for path in map(Path, paths):
            above = [*(path / "_").absolute().parents, *(path / "_").resolve().parents]
            if replaced.resolve() in [place.resolve() for place in above]:
                raise LaunchError(
                    f"{key} {path} lies in {replaced}, whose run --overwrite replaces",
                    where=recipe.where(key),
                    help="another --output_dir",
                )


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _rebuild_manifest(run: Run) -> None:
    """Rebuild a run.json that is lost, empty or damaged from the newest checkpoint that holds its content."""
    if status(run.folder) != "unreadable":
        return
    for step in reversed(whole_steps(run.folder)):
        checkpoint = of_step(run.folder, step)
        try:
            run.manifest = {**read_object(checkpoint / COMPLETE)["run"], "status": "running"}
        except (ValueError, KeyError, TypeError):
            continue
        say(f"⚠ {run.folder / MANIFEST} is lost or damaged: it is rebuilt from {checkpoint}")
        return run.update()


def resumption_entry(checkpoint: Path | None) -> dict[str, Any] | None:
    """What run.json records of a resumption."""
    if not checkpoint:
        return None
    owes = {"owes_evaluation": True} if read_object(checkpoint / STATE).get("owes_evaluation") else {}
    return {"step": step_of(checkpoint), "from": str(checkpoint), **owes}


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are complete by size and hash; prints what is wrong with newer ones.

    Raises:
        CheckpointError: there are some, and none is complete.
    """
    marked = [file.parent for file in folder.glob(f"checkpoint-*/{COMPLETE}") if ASIDE not in file.parent.name]
    faults = [f"{checkpoint}: not the name of a checkpoint" for checkpoint in marked if step_of(checkpoint) is None]
    for step in reversed(whole_steps(folder)):
        checkpoint = of_step(folder, step)
        if not (fault := damage(checkpoint)):
            return checkpoint
        faults.append(f"{checkpoint}: {fault}")
        say(f"⚠ {faults[-1]}; the one before it is tried")
    if faults:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole",
            why="\n".join(faults),
            help="put the files back from a copy, or --overwrite to start anew",
        )
    return None


def damage(checkpoint: Path, weights_only: bool = False) -> str:
    """What is wrong with a checkpoint, or nothing; `weights_only` where only its weights are needed."""
    try:
        content, files = _content(checkpoint)
        if not content["resumable"] and not weights_only:
            return "it holds the weights only (save_only_model: true)"
        if content["step"] != step_of(checkpoint):
            return f"it was written at step {content['step']}"
        needed = {TRAINER_STATE} if weights_only else {TRAINER_STATE, STATE}
        if not needed <= files.keys() or not any(name.startswith("model-") for name in files):
            return f"{COMPLETE} lists no weights, {TRAINER_STATE} or {STATE}"
        for name, facts in files.items():
            size = (checkpoint / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size:,} bytes instead of {facts['bytes']:,}"
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            hashes = pool.map(hash_file, [checkpoint / name for name in files])
            for (name, facts), digest in zip(files.items(), hashes, strict=True):
                if digest != facts["sha256"]:
                    return f"{name} is not what was written (SHA-256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{COMPLETE}: {error if isinstance(error, ValueError) else repr(error)}"
    return ""


def listed_files(checkpoint: Path) -> list[Path]:
    """The files that `COMPLETE.json` lists, sorted by name: no other file of the folder is to be read.

    Raises:
        CheckpointError: the list cannot be read, or names anything but ordinary files of the folder.
    """
    try:
        return [checkpoint / name for name in sorted(_content(checkpoint)[1])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read", why=str(error)) from None


def _content(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`COMPLETE.json`, and the files in it; ValueError where it names anything but ordinary files beside it."""
    _check_ordinary(checkpoint, stat.S_ISDIR)
    _check_ordinary(checkpoint / COMPLETE)
    content = read_object(checkpoint / COMPLETE)
    for name in content["files"]:
        if name != Path(name).name:
            raise ValueError(f"{name} is a path, not the name of a file")
        _check_ordinary(checkpoint / name)
    return content, dict(content["files"])


def _check_ordinary(path: Path, is_kind: Callable[[int], bool] = stat.S_ISREG) -> None:
    """ValueError for a link, a device or a FIFO, whose opening could wait for ever."""
    if not is_kind(path.lstat().st_mode):
        raise ValueError(f"{path.name} is no ordinary {'file' if is_kind is stat.S_ISREG else 'folder'}")


def _outdated_best(checkpoint: Path, before: dict[str, Any], recipe: Recipe, inputs: Inputs | None) -> str:
    """Why the best step so far and the coming ones are not measured alike, or nothing.

    The checkpoint records how it was measured. run.json may not: a start that was allowed to change it may have died
    before its own first checkpoint.
    """
    began = read_object(checkpoint / COMPLETE).get("run")
    began = began if isinstance(began, dict) and isinstance(began.get("recipe"), dict) else before
    known = began.get("inputs", before.get("inputs"))
    evaluated = known.get(EVALUATION) if isinstance(known, dict) else None
    faults = []
    if _choice(began["recipe"]) != _choice(recipe.values):
        faults.append("another metric")
    if inputs and evaluated and evaluated != inputs.found.get(EVALUATION, evaluated):
        faults.append("other evaluation rows")
    if faults and read_object(checkpoint / TRAINER_STATE)["best_metric"] is not None:
        return " and ".join(faults)
    return ""


def _choice(values: dict[str, Any]) -> tuple[str, bool]:
    """The metric by which the best step is chosen, and whether more is better, as Transformers completes them."""
    metric, greater = str(values.get("metric_for_best_model") or "loss"), values.get("greater_is_better")
    return metric.removeprefix("eval_"), not metric.endswith("loss") if greater is None else greater


def _check_best(checkpoint: Path) -> None:
    """Raise CheckpointError where the best checkpoint so far, which may become the result, is damaged."""
    try:
        step = read_object(checkpoint / TRAINER_STATE)["best_global_step"]
        if not isinstance(step, int | None):
            raise ValueError(f"best_global_step is {step!r}")
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint / TRAINER_STATE} cannot be used", why=str(error)) from None
    best = of_step(checkpoint.parent, step or 0)
    if step and best.name != checkpoint.name and (fault := damage(best, weights_only=True)):
        raise CheckpointError(f"the best checkpoint so far, {best}, is not whole", why=fault, help=WITHOUT_BEST)


def _check_chosen(chosen: Path, folder: Path) -> Path:
    if chosen.absolute().parent.resolve() != folder.resolve() or step_of(chosen) not in whole_steps(folder):
        raise _no_checkpoint_of(chosen, folder)
    if fault := damage(chosen):
        raise CheckpointError(f"{chosen} cannot be resumed from", why=fault, help="--resume auto takes a whole one")
    return chosen


def _no_checkpoint_of(chosen: Path, folder: Path) -> LaunchError:
    steps = whole_steps(folder)
    return LaunchError(
        f"--resume {chosen}: no checkpoint of the run in {folder}",
        help=f"one of {', '.join(str(of_step(folder, step)) for step in steps)}" if steps else "--resume auto",
    )


def _check_recipe(recipe: Recipe, before: dict[str, Any], allowed: list[str], where: str) -> None:
    changes = {key: change for key, change in recipe.changes(before).items() if key not in allowed}
    if changes:
        raise LaunchError(
            f"output_dir {recipe.output_dir} holds an unfinished run of another recipe",
            where=where,
            why="\n".join(f"{key}: {old} → {new}" for key, (old, new) in sorted(changes.items())),
            help="another --output_dir; or to go on with the change: "
            + " ".join(f"--allow_change {key}" for key in sorted(changes)),
        )
    by_metric = {before.get("lr_scheduler_type"), recipe.get("lr_scheduler_type")} & {*BY_METRIC}
    if by_metric and (keys := OF_THE_RATE & recipe.changes(before).keys()):
        raise LaunchError(
            f"{' and '.join(sorted(keys))} cannot change as the run in {recipe.output_dir} is resumed",
            where=recipe.where(min(keys)),
            why=f"{min(by_metric)} derives each rate from the one before and the evaluations so far",
            help="the values that it began with, or another --output_dir",
        )


def _set_aside(folder: Path, step: int) -> None:
    """Rename interrupted saves, and the checkpoints after the step that is resumed from.

    The run, when it reaches such a step again, would take it for saved. What an earlier start has set
    aside is removed, so that the many starts of a queue do not fill the disk.
    """
    earlier = [*folder.glob(f"checkpoint-*{ASIDE}*")]
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        number = step_of(checkpoint)
        if number is None or not checkpoint.is_dir():
            continue
        if not (checkpoint / COMPLETE).is_file():
            say(f"⚠ {checkpoint} was never complete (its save was cut off)")
        elif number <= step:
            continue
        while earlier:
            old = earlier.pop()
            say(f"  {old.name}, set aside by an earlier start, is removed")
            remove(old)
        say(f"  {checkpoint.name} is now {checkpoint.name}{ASIDE}")
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}{ASIDE}"))
