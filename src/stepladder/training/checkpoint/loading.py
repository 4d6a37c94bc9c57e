"""Putting a checkpoint back, on any strategy and any number of ranks: each rank reads its part of each tensor.

A file of `saving.py` holds whole tensors by their names, and flat ranges of tensors as `NAME@START`, with the shape of
the unsharded tensor in its metadata (`SHAPES`). Nothing is read before `StoredTensor.read`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.optim.lr_scheduler import LambdaLR

from stepladder import generators
from stepladder.console import say
from stepladder.errors import CheckpointError
from stepladder.training.checkpoint import state
from stepladder.training.checkpoint.longer import EARLY_STOPPING
from stepladder.training.checkpoint.resume import STATE, WITHOUT_BEST, damage, listed_files
from stepladder.training.launch.ranks import from_first

SHAPES = "shapes"  # the key in a file's metadata


def load(trainer: Any, folder: Path) -> None:
    """Put weights, optimizer, scheduler and scaler back; every rank calls it, on any strategy.

    Raises:
        CheckpointError: its parameters are not those that are trained here.
    """
    here = state.trainable_state(trainer)
    weights, states = _weights(folder, here), open_tensors(folder, "optimizer")
    by_parameter: dict[str, dict[str, state.Read]] = defaultdict(dict)
    for name, tensor in states.items():
        parameter, _, key = name.rpartition("/")
        by_parameter[parameter][key] = tensor.read
    here.put_states(by_parameter)
    with torch.no_grad():
        for name, tensor in weights.items():
            here.fill_weights(name, tensor.read)
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _put_scheduler(trainer, saved["scheduler"])
    if (scaler := state.loss_scaler(trainer)) and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    trainer.meter.restore(saved["telemetry"])
    trainer._total_train_tokens = saved["tokens"]
    trainer.owes_evaluation = trainer.args.eval_on_start = saved.get("owes_evaluation", False)
    trainer.early_stopping.count = saved.get(EARLY_STOPPING, 0)


def compare_rates(trainer: Any) -> None:
    """Warn if the steps so far were trained with other learning rates than this recipe gives them."""
    scheduler, done = trainer.lr_scheduler, trainer.state.global_step
    warns = trainer.args.process_index == 0 and isinstance(scheduler, LambdaLR)
    if not warns or scheduler.last_epoch != done:  # fp16 leaves steps out
        return
    for row in trainer.meter.run.rows():
        here = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](row["step"] - 1)
        if not math.isclose(row.get("learning_rate", here), here, rel_tol=1e-6):
            say(f"⚠ this is not the curve of a run that began with this recipe: step {row['step']} was trained with")
            say(f"  a rate of {row['learning_rate']:.4g}, and its schedule over all steps has {here:.4g} there")
            return


def load_weights(trainer: Any, folder: Path) -> None:
    """Put the weights alone back; every rank calls it.

    Raises:
        CheckpointError: it is damaged, or its parameters are not those that are trained here.
    """
    if fault := from_first(damage(folder, weights_only=True) if trainer.args.process_index == 0 else ""):
        raise CheckpointError(f"the best checkpoint, {folder}, cannot be loaded", why=fault, help=WITHOUT_BEST)
    here = state.trainable_state(trainer)
    with torch.no_grad():
        for name, tensor in _weights(folder, here).items():
            here.fill_weights(name, tensor.read)


def load_position(trainer: Any, folder: Path) -> None:
    """Put back the sums since the last logged step, and the random generators.

    Call it last before the first step: the loaders draw random numbers.
    """
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    trainer._tr_loss += saved["since_log"]["loss"]
    trainer._globalstep_last_logged = saved["since_log"]["step"]
    for key, values in saved["since_log"]["metrics"].items():
        trainer._metrics["train"][key].extend(values)
    file = folder / f"rng-{trainer.args.process_index}.safetensors"
    if file not in listed_files(folder):  # more ranks than before: there is no state to continue
        torch.manual_seed(trainer.args.seed + trainer.args.process_index + 1_000_003 * trainer.state.global_step)
        return
    generators.load(file)


def _weights(folder: Path, here: state.Trained) -> dict[str, StoredTensor]:
    """The weights of a checkpoint. Raises CheckpointError if they are not those that are trained here."""
    weights = open_tensors(folder, "model")
    if set(weights) != set(here.parameters):
        missing, extra = sorted({*here.parameters} - {*weights}), sorted({*weights} - {*here.parameters})
        why = f"missing: {missing[:3] or 'none'}; not known here: {extra[:3] or 'none'}"
    else:
        shapes = {name: (weights[name].shape, here.shape(name)) for name in weights}
        why = next((f"{name} has the shape {a}, here {b}" for name, (a, b) in shapes.items() if a != b), "")
    if why:
        raise CheckpointError(
            f"{folder} holds other parameters than this run trains",
            why=why,
            help="the recipe, base model and libraries of the run that wrote it, or another --output_dir",
        )
    return weights


def _put_scheduler(trainer: Any, saved: dict[str, Any]) -> None:
    """Continue the schedule. ZeRO omits empty parameter groups, so their number may differ."""
    groups, rates, scheduler = trainer.optimizer.param_groups, saved["_last_lr"], trainer.lr_scheduler
    if len(rates) != len(groups):
        rates = rates[:1] * len(groups)
    if isinstance(scheduler, LambdaLR):  # the recipe's own at this step, which `--allow_change` may have changed
        factors = [factor(saved["last_epoch"]) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    scheduler.load_state_dict({**scheduler.state_dict(), **saved, "_last_lr": rates})
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


class StoredTensor:
    """A tensor that lies in one file, or in several by ranges of its flattened elements.

    Args:
        pieces: the index of the first element and safetensors' slice of each piece, in any order.

    Raises:
        CheckpointError: the pieces do not cover the shape.
    """

    def __init__(self, name: str, shape: tuple[int, ...], pieces: list[tuple[int, Any]]):
        self.name, self.shape = name, shape
        self.pieces = [
            (start, start + math.prod(piece.get_shape()), piece) for start, piece in sorted(pieces, key=lambda p: p[0])
        ]
        ends = [0, *(stop for _, stop, _ in self.pieces)]
        if ends[-1] != math.prod(shape) or any(p[0] != end for p, end in zip(self.pieces, ends[:-1], strict=True)):
            raise CheckpointError(
                f"a checkpoint holds a part of {name} only",
                why=f"its pieces do not cover the shape {shape}",
                help="--resume with an older checkpoint",
            )

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The flattened elements from `start` to `stop`, which are read from the files that hold them."""
        parts = [
            _read_range(piece, max(start, first) - first, min(stop, last) - first)
            for first, last, piece in self.pieces
            if max(start, first) < min(stop, last)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def open_tensors(folder: Path, kind: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's files of a kind (`model` or `optimizer`) by name.

    Raises:
        CheckpointError: one is not complete.
    """
    pieces: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in listed_files(folder):
        if not file.name.startswith(f"{kind}-"):
            continue
        tensors = safe_open(file, framework="pt").__enter__()
        unsharded = json.loads((tensors.metadata() or {}).get(SHAPES, "{}"))
        for key in tensors.keys():  # noqa: SIM118
            piece = tensors.get_slice(key)
            name, _, start = key.rpartition("@") if key in unsharded else (key, "", "0")
            pieces[name].append((int(start), piece))
            shapes[name] = tuple(unsharded.get(key, piece.get_shape()))
    return {name: StoredTensor(name, shapes[name], found) for name, found in pieces.items()}


def _read_range(piece: Any, start: int, stop: int) -> torch.Tensor:
    """Flattened elements of a tensor in a file, of which the rows that hold them are read."""
    shape = piece.get_shape()
    if not shape:
        return piece[...].flatten()
    width = math.prod(shape[1:])
    first = start // width
    return piece[first : -(-stop // width)].flatten()[start - first * width : stop - first * width]
