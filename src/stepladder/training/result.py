"""The result of a run: the model or adapter on disk, verified by its loss, with its tokenizer and a card."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stepladder import console
from stepladder.errors import ModelError, TrainingError, first_line
from stepladder.model import card, initial_factors, portable, weights
from stepladder.run import Run
from stepladder.training import final_save
from stepladder.training.checkpoint import state
from stepladder.training.trainer import Trainer

ROWS = 8  # of the training set, whose loss is compared
# FSDP and ZeRO train fp32 weights even where the recipe's `dtype`, in which a result is saved, has 16 bits.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}  # of the loss, relative above 1


def adapter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a saved adapter must hold, by their names in the file; empty without an adapter.

    Taken before training, when no strategy has sharded the tensors yet.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in final_save.adapter_tensors(model).items()}
    if initial_factors.is_decomposed(model):
        shapes = {name: initial_factors.saved_shape(name, shape) for name, shape in shapes.items()}
    return shapes


def parameter_counts(model: Any) -> dict[str, int]:
    """All and trainable parameters; packed 4-bit values and ZeRO-3's shards count unpacked and whole."""
    counts = {"all": 0, "trainable": 0}
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":  # two values per byte, several bytes per element of storage
            count *= 2 * parameter.element_size()
        counts["all"] += count
        counts["trainable"] += count if parameter.requires_grad else 0
    return counts


def save(trainer: Trainer, run: Run, shapes: dict[str, tuple[int, ...]]) -> None:
    """Save the trained model into the run folder, verify it, and push it where the recipe says so; every rank calls it.

    Raises:
        TrainingError: it cannot be written or pushed.
        ModelError: the saved weights are not the trained ones, or are incomplete.
    """
    try:
        _save(trainer, run, shapes)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise TrainingError(
            f"the result could not be written: {error}",
            where=str(run.folder),
            help="make room, then the same command again: it resumes from the newest complete checkpoint",
            this_rank_only=True,
        ) from None
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub("Model save", revision=trainer.args.hub_revision)
        except Exception as error:  # the hub's client has a class of errors for each layer below it
            raise TrainingError(
                f"the result is saved, and could not be pushed to the hub: {first_line(error)}",
                where=str(run.folder),
                help=f"hf upload {trainer.hub_model_id} {run.folder} --exclude 'checkpoint-*'",
                this_rank_only=True,
            ) from None


def _save(trainer: Trainer, run: Run, shapes: dict[str, tuple[int, ...]]) -> None:
    names = final_save.write_weights(trainer, run.folder)
    trainer.accelerator.wait_for_everyone()
    run.update(saved=verify_saved(trainer, run.folder, names, run.manifest["precision"]))
    if not run.is_writer:
        return
    trainer.processing_class.save_pretrained(run.folder)
    weights.apply_umask(run.folder)
    if shapes:
        weights.check_saved_adapter(run.folder, shapes)
        # The tokens that end an answer, which the base's configuration may lack.
        trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(run.folder)
    else:
        check_saved_model(run.folder, run.manifest["parameters"]["all"])
    for remark in portable.add_older_names(run.folder, trainer.processing_class):
        console.say(f"  note: {remark}")
    base, (_, losses) = run.manifest["starts_from"]["base"], card.read_training(run.folder)
    licence = card.front_matter(Path(base)).get("license")
    text = card.render(run.folder, base, licence, run.manifest, losses, merged=None)
    (run.folder / "README.md").write_text(text, encoding="utf-8")


def check_saved_model(folder: Path, parameters: int) -> None:
    """Raise ModelError where a saved full model holds fewer parameters than the trained one.

    Counted rather than compared by name: Transformers may rename and fuse tensors as it saves.
    """
    found = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if found < parameters:
        raise ModelError(
            f"the saved model is not whole: {found:,} of {parameters:,} parameters",
            where=str(folder),
            help="resume from the last checkpoint in one process, which saves again",
        )


def verify_saved(trainer: Any, folder: Path, names: dict[str, str], precision: str) -> dict[str, float | int | None]:
    """Load the saved weights into the trained model and compare its loss; every rank calls it, after the training.

    Sharded strategies have saved empty and partial weights without an error (trl#4416, peft#2450); names
    and shapes may be right and the values another layer's.

    Args:
        names: the model's name of each tensor in the files, of those that can be put back.

    Returns:
        `tensors` read back, and the `loss` of the saved weights (nats per token); None where it is NaN for the trained
        ones too (`on_nan: skip` leaves such rows out of the training).

    Raises:
        ModelError: the loss differs.
    """
    before = _loss(trainer)
    count = _put_back(trainer, folder, names)
    after = _loss(trainer)
    if math.isnan(before) and math.isnan(after):
        return {"tensors": count, "loss": None}
    if not abs(after - before) <= TOLERANCE[precision] * max(1.0, before):
        raise ModelError(
            f"the saved weights are not the trained ones: loss {after:.6f} on {ROWS} rows, {before:.6f} before",
            where=str(folder),
            help="resume from the last checkpoint under another strategy, which saves again",
        )
    return {"tensors": count, "loss": after}


def _put_back(trainer: Any, folder: Path, names: dict[str, str]) -> int:
    trained = state.trainable_state(trainer)
    left = set(trained.parameters)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            # in the order of the file, which is the same on every rank: each put is collective
            for key in tensors.keys():  # noqa: SIM118
                if (name := names.get(key)) in left:
                    kept = tuple(
                        slice(size) for size in trained.shape(name)
                    )  # of a converted adapter, the trained half
                    trained.put_weights(name, tensors.get_tensor(key)[kept])
                    left.remove(name)
    return len(trained.parameters) - len(left)


def _loss(trainer: Any) -> float:
    from datasets import Dataset

    rows = trainer.train_dataset
    sample = (
        rows.select(range(min(ROWS, len(rows))))
        if isinstance(rows, Dataset)
        else Dataset.from_list(list(itertools.islice(rows, ROWS)))
    )
    loader = trainer.get_eval_dataloader(sample)
    output = trainer.evaluation_loop(loader, "", prediction_loss_only=True, metric_key_prefix="saved")
    return float(output.metrics["saved_loss"])
