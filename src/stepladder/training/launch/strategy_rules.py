"""What a strategy cannot compute as one process does: refused, or noted where the run begins.

ZeRO concatenates all weights and cuts them into equal slices: an optimizer sees slices, not
matrices. Figures are differences of losses after 7 steps of the tiny model of tests/ (tests/test_train.py).
"""

from __future__ import annotations

from pathlib import Path

from stepladder.errors import RecipeError
from stepladder.model import start
from stepladder.recipe.recipe import Recipe
from stepladder.training.launch.launcher import Launch

# Their update of a weight depends on that weight alone, so slices change nothing.
ELEMENTWISE = {
    *("adamw_torch", "adamw_torch_fused", "adamw_anyprecision", "ademamix", "sgd", "adagrad", "rmsprop"),
    *("lion_32bit", "paged_adamw_32bit", "paged_ademamix_32bit", "paged_lion_32bit", "rmsprop_bnb"),
    *("rmsprop_bnb_32bit", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
}
# Those that compute on FSDP's shards (DTensor); bitsandbytes' kernels, Adafactor and the rest need plain tensors.
ON_SHARDS = {
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("sgd", "adagrad", "rmsprop", "grokadamw", "stable_adamw"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
}
EMBEDDINGS = ("embed", "wte")  # in the names of input embeddings
# Part of their state is no plain tensor of `optimizer.state`: a projector, a dictionary of their own, or torchao's
# quantized tensors, which differ by a rounding once they were written as plain ones.
NOT_SAVED = ("galore", "apollo", "adalomo", "adamw_torch_4bit", "adamw_torch_8bit")


def _unusable(optimizer: str, launch: Launch) -> str:
    """Why an optimizer cannot compute or be saved under a strategy; empty where it can."""
    if optimizer.startswith(NOT_SAVED):
        return "a checkpoint cannot hold the whole of its state, so an interrupted run could not resume"
    if optimizer == "lomo" and launch.ranks > 1:
        return "it updates the weights in the backward pass, before the ranks have averaged their gradients"
    if launch.strategy.is_fsdp and optimizer not in ON_SHARDS:
        return "FSDP gives an optimizer sharded tensors (DTensor), and this one computes on plain tensors only"
    if launch.strategy.is_zero and optimizer.endswith("8bit"):
        return "it quantizes its state in blocks, which ZeRO's slices cut: a checkpoint cannot hold them"
    if launch.strategy.is_zero and optimizer not in ELEMENTWISE:
        return (
            "it needs whole matrices and ZeRO gives an optimizer slices of all weights laid end to end: "
            "the curve would be another one (adafactor's by 5e-2 within 7 steps)"
        )
    return ""


def _check_whole_modules(recipe: Recipe, launch: Launch) -> None:
    """Raise RecipeError for embeddings beside an adapter (`lora_modules_to_save`) that a strategy cannot train or save.

    Whether its embeddings are tied is known only where the base is a folder.
    """
    whole = recipe.get("lora_modules_to_save") or []
    inputs = [name for name in whole if any(part in name for part in EMBEDDINGS)]
    why = ""
    if inputs and launch.strategy.is_zero and launch.strategy.shards_weights:
        why = "PEFT saves input embeddings on one rank, which has a shard of them: DeepSpeed ends there"
    elif launch.strategy.is_fsdp and (inputs := [*inputs, *(n for n in whole if n == "lm_head")]):
        tied = start.object_in(Path(start.of_recipe(recipe).base) / "config.json").get("tie_word_embeddings")
        if tied:
            why = "FSDP shards a module by itself, and input and output embeddings are one tensor in this base"
    if why:
        raise RecipeError(
            f"lora_modules_to_save: {inputs[0]} cannot be trained under {launch.strategy}",
            where=recipe.where("lora_modules_to_save"),
            why=why,
            help="accelerate_configs/ddp.yaml or zero2.yaml",
        )


def check(recipe: Recipe, launch: Launch) -> list[str]:
    """Notes on what will differ from one process by more than rounding.

    Raises:
        RecipeError: an optimizer that no checkpoint can hold, that computes something else on the slices of ZeRO,
            or nothing on the shards of FSDP.
    """
    notes, optimizer, where = [], str(recipe.get("optim")), recipe.where("optim")
    if why := _unusable(optimizer, launch):
        others = {"zero3": optimizer in ELEMENTWISE, "fsdp": optimizer in ON_SHARDS, "ddp": True}
        instead = next(name for name, trains in others.items() if trains)
        raise RecipeError(
            f"optim: {optimizer} cannot run under {launch.strategy}",
            where=where,
            why=why,
            help="optim: adamw_torch_fused"
            + (f", or accelerate_configs/{instead}.yaml" if not optimizer.startswith((*NOT_SAVED, "lomo")) else ""),
        )
    kind = recipe.get("peft_type")
    if recipe.get("use_peft") and kind != "lora" and launch.strategy.shards_weights:
        raise RecipeError(
            f"peft_type: {kind} cannot run under {launch.strategy}",
            where=recipe.where("peft_type"),
            why="PEFT runs the virtual tokens through their encoder as it saves, on one rank, which has a shard of it",
            help="accelerate_configs/ddp.yaml or zero2.yaml: the trained tensor is too small to shard",
        )
    if recipe.get("use_peft"):
        _check_whole_modules(recipe, launch)
    if recipe.get("load_in_8bit") and launch.ranks > 1:
        notes.append(
            f"{recipe.where('load_in_8bit')}: load_in_8bit finds outliers batch by batch, so evaluation "
            "losses depend on how the rows lie over the ranks (by about 2e-4); load_in_4bit does not"
        )
    return notes
