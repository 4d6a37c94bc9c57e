"""Load a model once on each node where FSDP can send the weights to the other ranks; else on each rank."""

from __future__ import annotations

import os
from typing import Any

from stepladder.console import say
from stepladder.model import load
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Launch
from stepladder.training.launch.ranks import from_first


def base_model(recipe: Settings, precision: str, launch: Launch) -> Any:
    """The model to train; every rank calls it once.

    Accelerate sends each parameter from rank 0 as it shards it (`fsdp2_load_full_state_dict`), which finds what a
    node's first rank has read, and what the others have not.
    """
    if not launch.strategy.is_fsdp or launch.ranks == 1:
        return load.base_model(recipe, precision)
    asked, reads = load.can_be_sent(recipe), launch.local_rank == 0
    model = load.base_model(recipe, precision) if reads or not asked else None
    sent = asked and from_first(model is not None and can_be_sent(model))
    if model is not None and asked and not sent and launch.rank == 0:
        say("note: each rank reads all weights, since this model has more than Accelerate could send from rank 0")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(sent).lower()  # read as the Trainer makes its Accelerator
    if model is None:
        model = load.unread_model(recipe) if sent else load.base_model(recipe, precision)
    return model


def can_be_sent(model: Any) -> bool:
    """Accelerate sends parameters, no buffers that a checkpoint holds, and ties what the configuration ties."""
    named = dict(model.named_parameters(remove_duplicate=False))
    ends = [getattr(layer, "weight", None) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    tied = ends[0] is ends[1]  # not where the file holds two, whatever its configuration says
    return named.keys() >= model.state_dict().keys() and tied == bool(
        model.config.get_text_config().tie_word_embeddings
    )
