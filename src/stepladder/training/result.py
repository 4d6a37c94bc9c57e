"""The end of a run: the model or adapter on disk, checked, with its tokenizer and a card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stepladder import console
from stepladder.errors import ModelError, TrainingError
from stepladder.model import card, portable, weights
from stepladder.run import Run
from stepladder.settings import Settings
from stepladder.training import reloaded
from stepladder.training.trainer import Trainer


def adapter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a saved adapter must hold, by their names in the file; empty without an adapter.

    Taken before training, when no strategy has sharded the tensors yet.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def parameter_counts(model: Any) -> dict[str, int]:
    """All and trainable parameters; packed 4-bit values and ZeRO-3's shards count as what they stand for."""
    counts = {"all": 0, "trainable": 0}
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            # Two values in a byte, and several bytes in an element of the storage type.
            count *= 2 * parameter.element_size()
        counts["all"] += count
        counts["trainable"] += count if parameter.requires_grad else 0
    return counts


def save(trainer: Trainer, run: Run, recipe: Settings, shapes: dict[str, tuple[int, ...]]) -> None:
    """Save what was trained into the run folder and check it; every rank calls it.

    Raises:
        TrainingError: it cannot be written.
        ModelError: the saved adapter is not the trained one, or the model is not whole.
    """
    from safetensors import SafetensorError

    try:
        _save(trainer, run, recipe, shapes)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise TrainingError(
            f"the result could not be written: {error}",
            where=str(run.folder),
            help="make room, then the same command again: it goes on from the newest whole checkpoint",
            this_rank_only=True,
        ) from None


def _save(trainer: Trainer, run: Run, recipe: Settings, shapes: dict[str, tuple[int, ...]]) -> None:
    trainer.save_model(str(run.folder))
    trainer.accelerator.wait_for_everyone()
    run.update(saved=reloaded.check(trainer, run.folder, run.manifest["precision"]))
    if not run.is_writer:
        return
    # Transformers pickles its arguments beside the model. Nothing reads them, and a pickle can
    # run code on the machine of whoever opens it.
    (run.folder / "training_args.bin").unlink(missing_ok=True)
    weights.share(run.folder)
    if shapes:
        weights.check_saved_adapter(run.folder, shapes)
        # Where an answer ends, which the base may not say.
        trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(run.folder)
    else:
        check_saved_model(run.folder, run.manifest["parameters"]["all"])
    for remark in portable.settle(run.folder, trainer.processing_class):
        console.say(f"  note: {remark}")
    base, (_, losses) = run.manifest["starts_from"]["base"], card.read_training(run.folder)
    licence = card.front_matter(Path(base)).get("license")
    text = card.render(run.folder, base, licence, run.manifest, losses, merged=None)
    (run.folder / "README.md").write_text(text, encoding="utf-8")


def check_saved_model(folder: Path, parameters: int) -> None:
    """A full model saved from sharded ranks must hold as many parameters as the one that was trained.

    Counted rather than compared by name: Transformers may rename and fuse tensors as it saves.
    """
    from safetensors import safe_open

    found = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if found < parameters:
        raise ModelError(
            f"the saved model is not whole: {found:,} of {parameters:,} parameters",
            where=str(folder),
            help="ZeRO-3 needs stage3_gather_16bit_weights_on_model_save: true in ds_configs/",
        )
