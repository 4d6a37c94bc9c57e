"""Atomic checkpoints, in one format for every strategy and number of ranks.

    checkpoint-N/model-RANK-PART.safetensors      the trained weights by name, in fp32
                 optimizer-RANK-PART.safetensors  `<weight>/<key>`
                 rng-RANK.safetensors             the random generators of each rank
                 trainer_state.json               Transformers' own
                 state.json                       scheduler, scaler, counters
                 COMPLETE.json                    written last: marks the checkpoint as complete

Tensors and JSON only: nothing in it can run code. Each rank writes what it holds: of a sharded tensor its range of
the flattened one (`loading.py`), of those that all ranks hold every world-size-th. It copies them to host memory, and
writes the copy while the training goes on. Upstream tried a rename as the last step twice, which raced between ranks
(transformers#27925, #35580); hence a file that one rank writes after all have reported that theirs are on the disk.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerCallback

from stepladder import generators, hardware
from stepladder.console import say
from stepladder.files import flush, write_atomic
from stepladder.training.checkpoint import state
from stepladder.training.checkpoint.longer import EARLY_STOPPING
from stepladder.training.checkpoint.resume import COMPLETE, STATE, TRAINER_STATE, of_step, whole_steps
from stepladder.training.checkpoint.state import Piece
from stepladder.training.checkpoint.writer import Writer, cut_into_parts

ROOM = 0.8  # of the free memory, which a copy of what is saved may take
NO_UPLOAD = (None, False, "false", "end")  # settings of a tracker that uploads no checkpoint
SET_BY_RECIPE = ("lr_lambdas", "base_lrs")  # keys of a scheduler's state that are not put back


@dataclass
class Save:
    """A checkpoint that is being written.

    Attributes:
        content: of `COMPLETE.json`, but for the files.
        blocks: whether it must be finished before the training goes on.
    """

    folder: Path
    step: int
    content: dict[str, Any]
    writer: Writer
    blocks: bool


def start(trainer: Any) -> Save | None:
    """Begin to write `checkpoint-<global_step>`; every rank calls it at a step's end, and `finish` later.

    What is written is a copy in host memory, unless it has no room there: then the save `blocks`, as it does where a
    callback reads the files.

    Returns:
        None if it cannot be written (disk full, read-only), of which rank 0 has warned.
    """
    folder = of_step(Path(trainer.args.output_dir), trainer.state.global_step)
    first = trainer.args.process_index == 0
    trainer.store_flos()
    fault = ""
    if first:
        trainer.meter.run.drop_replaced()  # its room may be needed
        shutil.rmtree(folder, ignore_errors=True)
        fault = _attempt(folder.mkdir, 0o777, True)
    if not _no_rank_failed(fault):
        return None
    weights, states = _own_pieces(trainer)
    loss, *blocks = _sum_over_ranks(
        trainer, float(trainer._tr_loss), _lacks_room(trainer, weights + states), _files_are_read(trainer)
    )
    if blocks[0]:
        _note_no_room()
    else:
        weights, states = _copies(weights), _copies(states)
    rank = trainer.args.process_index
    parts = cut_into_parts(f"model-{rank}", weights) + cut_into_parts(f"optimizer-{rank}", states)
    writes: dict[str, Callable[[Path], Any]] = {f"rng-{rank}.safetensors": generators.save}
    if first:
        counters = json.dumps(_counters(trainer, loss / trainer.args.world_size), indent=1)
        writes |= {
            TRAINER_STATE: trainer.state.save_to_json,
            STATE: lambda file: file.write_text(counters, encoding="utf-8"),
        }
    writer = Writer(folder, parts, [*writes])
    for name, write in writes.items():  # they change with the next step
        writer.fault = writer.fault or _attempt(write, folder / name)
    writer.start()
    return Save(folder, trainer.state.global_step, _content(trainer), writer, blocks=any(blocks))


def finish(trainer: Any, save: Save) -> bool:
    """Wait until the files of all ranks are on the disk, and complete the checkpoint; every rank calls it.

    Returns:
        Whether it is complete. If not, rank 0 has warned and removed the incomplete folder; older checkpoints are
        untouched, and the next save tries again.
    """
    _wait(trainer, save)
    first, fault = trainer.args.process_index == 0, ""
    if files := _no_rank_failed(save.writer.fault, save.writer.files):
        if first:
            fault = _attempt(_complete, save, files)
        if _no_rank_failed(fault):
            if first and (fault := _attempt(_delete_older, trainer)):
                say(f"⚠ an older checkpoint could not be deleted: {fault}")
                say("  the run goes on, and the next save tries again")
            return True
    if first:
        shutil.rmtree(save.folder, ignore_errors=True)
    return False


def _own_pieces(trainer: Any) -> tuple[list[tuple[str, Piece]], list[tuple[str, Piece]]]:
    """What this rank writes of the weights and of the optimizer's states, by the names in its files.

    What is not sharded is written by one rank each. Nothing is copied here, nor sent between the ranks.
    """
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    weights, states = [], []
    here = state.trainable_state(trainer)
    for number, name in enumerate(here.parameters):
        for key, piece in here.pieces(name):
            if not (piece.values.numel() if piece.sharded else number % ranks == rank):
                continue
            place = f"@{piece.start}" if piece.sharded else ""
            if key == state.WEIGHT:
                weights.append((name + place, piece))
            elif not trainer.args.save_only_model:
                states.append((f"{name}/{key}{place}", piece))
    return weights, states


def _copies(pieces: list[tuple[str, Piece]]) -> list[tuple[str, Piece]]:
    return [(name, piece._replace(values=piece.values.to("cpu", copy=True))) for name, piece in pieces]


def _lacks_room(trainer: Any, pieces: list[tuple[str, Piece]]) -> bool:
    """Whether the copies of all ranks of this node may not fit into its memory, if theirs are like this rank's."""
    ranks, held = max(1, trainer.meter.ranks_a_node), psutil.Process().memory_info()
    own = held.rss - getattr(held, "shared", 0)  # without mapped files, such as the base's
    memory = min(psutil.virtual_memory().available, hardware.host_memory() - ranks * own)
    return ranks * sum(piece.values.nbytes for _, piece in pieces) > ROOM * memory


@functools.cache  # once is enough
def _note_no_room() -> None:
    say("⚠ host memory has no room for a copy of the checkpoint: the training waits while saves are written")


def _files_are_read(trainer: Any) -> bool:
    """Whether a callback's `on_save` may read a checkpoint: the user's own, or a tracker that uploads it."""
    for callback in trainer.callback_handler.callbacks:
        reader = getattr(callback, "callback", callback)  # a tracker's own; None once it has failed
        uploads: Any = getattr(reader, "_log_model", True)
        uploads = getattr(uploads, "value", uploads)  # W&B's is an enumeration
        if reader and type(reader).on_save is not TrainerCallback.on_save and uploads not in NO_UPLOAD:
            return True
    return False


def _sum_over_ranks(trainer: Any, *values: float) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float32, device=trainer.args.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def _wait(trainer: Any, save: Save) -> None:
    """Return once the writers of all ranks have ended; every rank calls it.

    The ranks ask each other each second, so that none stands in a collective for as long as another writes. The
    watchdog moves as long as one of them does.
    """
    moved = -1
    while True:
        now = save.writer.moved
        writing, moving = _sum_over_ranks(trainer, save.writer.writes, now != moved)
        if moving:
            trainer.watchdog.move()
        trainer.watchdog.waits_for = save.writer.describe() if writing else ""
        if not writing:
            return
        moved = now
        save.writer.wait(1.0)


def _counters(trainer: Any, loss: float) -> dict[str, Any]:
    scaler = state.loss_scaler(trainer)
    return {
        "scheduler": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if k not in SET_BY_RECIPE},
        "scaler": scaler.state_dict() if scaler else None,
        "telemetry": trainer.meter.to_checkpoint(),
        "tokens": trainer._total_train_tokens,
        "owes_evaluation": trainer.owes_evaluation,
        EARLY_STOPPING: trainer.early_stopping.count,
        # summed up since the last logged step, for `logging_steps` above 1
        "since_log": {
            "loss": loss,
            "step": trainer._globalstep_last_logged,
            "metrics": dict(trainer._metrics["train"]),
        },
    }


def _content(trainer: Any) -> dict[str, Any]:
    facts = dict(trainer.meter.run.manifest)
    return {
        "step": trainer.state.global_step,
        **{key: facts.get(key) for key in ("world_size", "strategy", "recipe_hash", "wandb_run_id")},
        "resumable": not trainer.args.save_only_model,
        "run": facts,  # from which a lost run.json is rebuilt
    }


def _complete(save: Save, files: dict[str, Any]) -> None:
    flush(save.folder)
    write_atomic(save.folder / COMPLETE, json.dumps({**save.content, "files": files}, indent=1) + "\n")
    flush(save.folder)
    flush(save.folder.parent)


def _delete_older(trainer: Any) -> None:
    """Keep `save_total_limit` complete checkpoints: the newest, and the best if there is one."""
    folder, limit = Path(trainer.args.output_dir), trainer.save_total_limit
    steps = whole_steps(folder)
    kept = {steps[-1], trainer.state.best_global_step} & {*steps}
    # The previous best goes last: if the newest is damaged, the one that is resumed from may name it.
    steps.sort(key=lambda step: step == trainer._best_before[1])
    for step in list(steps) if limit else []:
        if len(steps) > max(limit, len(kept)) and step not in kept:
            # its mark first: if the process is killed in between, it is a leftover, not a damaged checkpoint
            (of_step(folder, step) / COMPLETE).unlink()
            shutil.rmtree(of_step(folder, step), ignore_errors=True)
            steps = [other for other in steps if other != step]


def _attempt(do: Callable[..., Any], *args: Any) -> str:
    """The error of `do(*args)`, or nothing. safetensors has its own error for a full disk."""
    try:
        do(*args)
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _no_rank_failed(fault: str, files: dict[str, Any] | None = None) -> dict[str, Any]:
    """The files of all ranks; empty if a rank failed, which rank 0 prints; never empty otherwise."""
    answers = [(fault, files or {})]
    if dist.is_initialized():
        answers = [("", {})] * dist.get_world_size()
        dist.all_gather_object(answers, (fault, files or {}))
    for rank, (found, _) in enumerate(answers):
        if found:
            say(f"⚠ rank {rank} could not write the checkpoint: {found}")
            say("  the older ones stand, the run goes on, and the next save tries again")
            return {}
    return {name: facts for _, theirs in answers for name, facts in theirs.items()} or {"": None}
