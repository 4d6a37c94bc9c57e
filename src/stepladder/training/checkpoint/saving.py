"""Atomic checkpoints, in one format for every strategy and number of ranks.

    checkpoint-N/model-RANK-PART.safetensors      the trained weights by name, unsharded, in fp32
                 optimizer-RANK-PART.safetensors  `<weight>/<key>`, unsharded
                 rng-RANK.safetensors             the random generators of each rank
                 trainer_state.json               Transformers' own
                 state.json                       scheduler, scaler, counters
                 COMPLETE.json                    written last: marks the checkpoint as complete

Tensors and JSON only: nothing in it can run code. Each rank writes every world-size-th parameter. Upstream
tried a rename as the last step twice, which raced between ranks (transformers#27925, #35580); hence a
file that one rank writes after all have reported that theirs are on the disk.
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR

from stepladder.console import say
from stepladder.errors import CheckpointError
from stepladder.files import flush, hash_file, write_atomic
from stepladder.training.checkpoint import state
from stepladder.training.checkpoint.resume import (
    COMPLETE,
    STATE,
    TRAINER_STATE,
    WITHOUT_BEST,
    damage,
    listed_files,
    of_step,
    whole_steps,
)
from stepladder.training.launch.ranks import from_first

GATHERED_BYTES = 1 << 30  # bytes that a rank gathers before it writes them: the memory that a save needs
SET_BY_RECIPE = ("lr_lambdas", "base_lrs")  # keys of a scheduler's state that are not put back


def save(trainer: Any) -> bool:
    """Write `checkpoint-<global_step>`; every rank calls it at a step's end.

    Returns:
        Whether it was written. If not (disk full, read-only), rank 0 has warned and removed the incomplete folder;
        older checkpoints are untouched, and the next save tries again.
    """
    folder = of_step(Path(trainer.args.output_dir), trainer.state.global_step)
    if whole_steps(folder.parent)[-1:] == [trainer.state.global_step]:
        return True  # the epoch ended with the step that was saved already
    first = trainer.args.process_index == 0
    trainer.store_flos()
    fault = ""
    if first:
        trainer.meter.run.drop_replaced()  # its room may be needed
        shutil.rmtree(folder, ignore_errors=True)
        fault = _attempt(folder.mkdir, 0o777, True)
    if _no_rank_failed(fault):
        files, fault = _write_share(trainer, folder)
        if found := _no_rank_failed(fault, files):
            if first:
                fault = _attempt(_complete, trainer, folder, found)
            if _no_rank_failed(fault):
                if first:
                    _delete_older(trainer)
                return True
    if first:
        shutil.rmtree(folder, ignore_errors=True)
    return False


def load(trainer: Any, folder: Path) -> None:
    """Put weights, optimizer, scheduler and scaler back; every rank calls it, on any strategy.

    Raises:
        CheckpointError: its parameters are not those that are trained here.
    """
    here = state.trainable_state(trainer)
    weights, states = _weights(folder, here.parameters), _tensors(folder, "optimizer")
    by_parameter: dict[str, dict[str, Callable[[], torch.Tensor]]] = defaultdict(dict)
    for name, read in states.items():
        parameter, _, key = name.rpartition("/")
        by_parameter[parameter][key] = read
    here.put_states(by_parameter)
    with torch.no_grad():
        for name, read in weights.items():
            here.put_weights(name, read())
    saved = json.loads((folder / STATE).read_text())
    _put_scheduler(trainer, saved["scheduler"])
    if (scaler := _scaler(trainer)) and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    trainer.meter.restore(saved["telemetry"])
    trainer._total_train_tokens = saved["tokens"]
    trainer.owes_evaluation = trainer.args.eval_on_start = saved.get("owes_evaluation", False)


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
        for name, read in _weights(folder, here.parameters).items():
            here.put_weights(name, read())


def load_position(trainer: Any, folder: Path) -> None:
    """Put back the sums since the last logged step, and the random generators.

    Call it last before the first step: the loaders draw random numbers.
    """
    saved = json.loads((folder / STATE).read_text())
    trainer._tr_loss += saved["since_log"]["loss"]
    trainer._globalstep_last_logged = saved["since_log"]["step"]
    for key, values in saved["since_log"]["metrics"].items():
        trainer._metrics["train"][key].extend(values)
    file = folder / f"rng-{trainer.args.process_index}.safetensors"
    if file not in listed_files(folder):  # more ranks than before: there is no state to continue
        torch.manual_seed(trainer.args.seed + trainer.args.process_index + 1_000_003 * trainer.state.global_step)
        return
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
        torch.set_rng_state(tensors.get_tensor("cpu"))
        if torch.cuda.is_available() and "cuda" in tensors.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(tensors.get_tensor("cuda"))
    version, numbers, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(json.loads(metadata["numpy"]))


# ---- writing


def _write_share(trainer: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """Write this rank's files. A rank whose disk is full still gathers, since the others wait for it."""
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    model, optimizer = _Parts(folder, f"model-{rank}"), _Parts(folder, f"optimizer-{rank}")
    here = state.trainable_state(trainer)
    for number, name in enumerate(here.parameters):
        for key, value in here.get(name):
            if number % ranks == rank and key == state.WEIGHT:
                model.add(name, value)
            elif number % ranks == rank and not trainer.args.save_only_model:
                optimizer.add(f"{name}/{key}", value)
    loss = torch.stack([trainer._tr_loss.detach().float()])
    if dist.is_initialized():
        dist.all_reduce(loss)
    model.close()
    optimizer.close()
    others: dict[str, Callable[[Path], Any]] = {f"rng-{rank}.safetensors": _write_random_states}
    if rank == 0:
        others[TRAINER_STATE] = trainer.state.save_to_json
        content = json.dumps(_counters(trainer, float(loss) / ranks), indent=1)
        others[STATE] = lambda file: file.write_text(content)
    fault = model.fault or optimizer.fault
    for file, write in others.items():
        fault = fault or _attempt(write, folder / file)
    files: dict[str, Any] = {}
    for file in [*model.files, *optimizer.files, *others]:
        fault = fault or _attempt(_flush, folder / file, files)
    return files, fault


class _Parts:
    """Collects tensors into files of about `GATHERED_BYTES` bytes."""

    def __init__(self, folder: Path, stem: str):
        self.folder, self.stem = folder, stem
        self.files: list[str] = []
        self.fault = ""
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def add(self, name: str, value: torch.Tensor) -> None:
        if not self.fault:
            self._held[name] = value.to("cpu").contiguous()
            self._bytes += value.nbytes
            if self._bytes >= GATHERED_BYTES:
                self.close()

    def close(self) -> None:
        if self._held:
            self.files.append(f"{self.stem}-{len(self.files)}.safetensors")
            self.fault = _attempt(save_file, self._held, self.folder / self.files[-1])
        self._held, self._bytes = {}, 0


def _write_random_states(file: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    numbers: Any = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()
    save_file(states, file, {"python": json.dumps(random.getstate()), "numpy": json.dumps(numbers)})


def _counters(trainer: Any, loss: float) -> dict[str, Any]:
    scaler = _scaler(trainer)
    return {
        "scheduler": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if k not in SET_BY_RECIPE},
        "scaler": scaler.state_dict() if scaler else None,
        "telemetry": trainer.meter.to_checkpoint(),
        "tokens": trainer._total_train_tokens,
        "owes_evaluation": trainer.owes_evaluation,
        # summed up since the last logged step, for `logging_steps` above 1
        "since_log": {
            "loss": loss,
            "step": trainer._globalstep_last_logged,
            "metrics": dict(trainer._metrics["train"]),
        },
    }


def _flush(file: Path, files: dict[str, Any]) -> None:
    """Wait until a file is on the disk, then record its size and hash."""
    flush(file)
    files[file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def _complete(trainer: Any, folder: Path, files: dict[str, Any]) -> None:
    facts = trainer.meter.run.manifest
    content = {
        "step": trainer.state.global_step,
        **{key: facts.get(key) for key in ("world_size", "strategy", "recipe_hash", "wandb_run_id")},
        "resumable": not trainer.args.save_only_model,
        "files": files,
        "run": facts,  # from which a lost run.json is rebuilt
    }
    flush(folder)
    write_atomic(folder / COMPLETE, json.dumps(content, indent=1) + "\n")
    flush(folder)
    flush(folder.parent)


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
    from safetensors import SafetensorError

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


# ---- reading


def _weights(folder: Path, parameters: dict[str, Any]) -> dict[str, Callable[[], torch.Tensor]]:
    """How to read each weight of a checkpoint. Raises CheckpointError if they are not those of `parameters`."""
    weights = _tensors(folder, "model")
    if set(weights) != set(parameters):
        missing, extra = sorted({*parameters} - {*weights}), sorted({*weights} - {*parameters})
        raise CheckpointError(
            f"{folder} holds other parameters than this run trains",
            why=f"missing: {missing[:3] or 'none'}; not known here: {extra[:3] or 'none'}",
            help="the recipe, base model and libraries of the run that wrote it, or another --output_dir",
        )
    return weights


def _tensors(folder: Path, kind: str) -> dict[str, Callable[[], torch.Tensor]]:
    """How to read each tensor, by name: nothing is read before."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for file in listed_files(folder):
        if not file.name.startswith(f"{kind}-"):
            continue
        tensors = safe_open(file, framework="pt").__enter__()
        for name in tensors.keys():  # noqa: SIM118
            found[name] = functools.partial(tensors.get_tensor, name)
    return found


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


class _ZeroScaler:
    """DeepSpeed's fp16 loss scaler, with the interface of torch's."""

    def __init__(self, scaler: Any):
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.scaler).items() if isinstance(value, int | float)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        vars(self.scaler).update(saved)


def _scaler(trainer: Any) -> Any:
    """The loss scaler of fp16; None without fp16."""
    if not trainer.args.fp16:
        return None
    if trainer.is_deepspeed_enabled:
        return _ZeroScaler(trainer.model_wrapped.optimizer.loss_scaler)
    return trainer.accelerator.scaler
