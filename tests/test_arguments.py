"""What a strategy cannot compute as one process does is refused, or said."""

from __future__ import annotations

import pytest

from stepladder.errors import RecipeError
from stepladder.recipe.schema import known_keys
from stepladder.training import arguments
from stepladder.training.launch.launcher import Launch, Strategy


def under(name: str, ranks: int = 2) -> Launch:
    return Launch(ranks=ranks, rank=0, local_rank=0, local_ranks=ranks, strategy=Strategy(name))


@pytest.mark.parametrize("optimizer", known_keys()["optim"].choices)
def test_every_optimizer_is_known_to_be_safe_or_refused_under_zero(optimizer, settings) -> None:
    """Guards against an optimizer of a new TRL that passes unseen: what is not known to be elementwise is refused."""
    recipe = settings(optim=optimizer)
    try:
        notes = arguments.check_strategy(recipe, under("zero3"))
    except RecipeError as error:
        assert optimizer in error.what and optimizer not in arguments.ELEMENTWISE
    else:
        assert optimizer in arguments.ELEMENTWISE and not notes
    if not optimizer.startswith((*arguments.NOT_SAVED, "lomo")):
        for name in ("single", "ddp"):
            assert not arguments.check_strategy(recipe, under(name)), "only ZeRO cuts matrices into slices"


@pytest.mark.parametrize("name", ["fsdp", "fsdp_offload"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_lion_32bit", "ademamix", "adafactor"])
def test_an_optimizer_of_plain_tensors_is_refused_under_fsdp(optimizer, name, settings) -> None:
    """Guards against a traceback at the first step: bitsandbytes' kernels have no rule for DTensors."""
    with pytest.raises(RecipeError, match=f"{optimizer} cannot run under {name}") as error:
        arguments.check_strategy(settings(optim=optimizer), under(name))
    assert "optim: adamw_torch_fused" in error.value.help
    assert ("zero3.yaml" in error.value.help) == (optimizer in arguments.ELEMENTWISE)
    assert not arguments.check_strategy(settings(optim="adamw_torch_fused"), under(name))


@pytest.mark.parametrize("optimizer", ["galore_adamw", "apollo_adamw_layerwise", "adalomo", "adamw_torch_8bit"])
def test_an_optimizer_that_no_checkpoint_holds_is_refused(optimizer, settings) -> None:
    """Guards against a traceback at the first save: GaLore and APOLLO keep projectors among their states, torchao its
    quantized tensors."""
    with pytest.raises(RecipeError, match=f"optim: {optimizer} cannot run under single"):
        arguments.check_strategy(settings(optim=optimizer), under("single", ranks=1))


def test_an_adapter_sums_its_gradients_on_shards(settings) -> None:
    """Guards a traceback of torch at the first step: an adapter under FSDP, its gradients summed whole by request."""
    own = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}}}
    with pytest.raises(RecipeError, match="sync_each_batch: false cannot run with an adapter under FSDP"):
        arguments.check_strategy(settings(use_peft=True, **own), under("fsdp"))
    assert not arguments.check_strategy(settings(use_peft=True, **own), under("ddp"))
    assert not arguments.check_strategy(settings(**own), under("fsdp"))


def test_an_output_layer_beside_an_adapter_is_refused_on_shards(settings) -> None:
    """Guards a silent other curve: each rank of FSDP trained its shard of the output layer on its own rows alone."""
    recipe = settings(use_peft=True, lora_modules_to_save=["lm_head"])
    for name in ("fsdp", "hsdp"):
        with pytest.raises(RecipeError, match=f"lora_modules_to_save: lm_head cannot be trained under {name}"):
            arguments.check_strategy(recipe, under(name))
    for name in ("ddp", "zero2", "zero3"):
        assert not arguments.check_strategy(recipe, under(name))


def test_lomo_is_refused_on_several_ranks(settings) -> None:
    """Guards a run whose ranks each train weights of their own, which only the check of the saved result found."""
    assert not arguments.check_strategy(settings(optim="lomo"), under("single", ranks=1))
    with pytest.raises(RecipeError, match="lomo cannot run under ddp"):
        arguments.check_strategy(settings(optim="lomo"), under("ddp"))


def test_an_8_bit_base_is_noted_on_several_ranks(settings) -> None:
    recipe = settings(load_in_8bit=True, use_peft=True)
    assert not arguments.check_strategy(recipe, under("single", ranks=1))
    (note,) = arguments.check_strategy(recipe, under("ddp"))
    assert "load_in_8bit" in note and "load_in_4bit" in note
