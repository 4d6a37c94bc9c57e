"""Under FSDP rank 0 alone reads the weights: the others build the model without them and receive their shards.

Rank 0 of all, not one rank per node: each shard has to come from one place in any case, and another node's reader
would read for nothing. Accelerate's own sending (`fsdp_cpu_ram_efficient_loading`) keeps all that rank 0 has read until
the last shard is sent, ties what the configuration ties, whatever the file held, and sends no buffers.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
from typing import Any

import torch
from accelerate.utils import fsdp2_canonicalize_names
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import distribute_tensor

from stepladder.console import say
from stepladder.model import attention, pretrained
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Launch
from stepladder.training.launch.ranks import from_first


def load_base_model(recipe: Settings, precision: str, launch: Launch) -> Any:
    """The model to train; under FSDP rank 0's only has weights, where they can be sent. Every rank calls it."""
    if not launch.strategy.is_fsdp or launch.ranks == 1:
        return pretrained.load_base(recipe, precision)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # read as the Trainer makes its Accelerator
    if not pretrained.recipe_can_be_sent(recipe):
        return pretrained.load_base(recipe, precision)
    model = pretrained.load_base(recipe, precision) if launch.rank == 0 else None
    empty = from_first(None if model is None else copy_without_weights(model))
    if model is None and empty is not None:
        model = pickle.loads(empty)
        attention.set_implementation(model, model.config.get_text_config()._attn_implementation)
        with torch.device("meta"):  # making a model registers which outputs its class records (`_CAN_RECORD_REGISTRY`)
            type(model)(copy.deepcopy(model.config))
    elif model is None:
        return pretrained.load_base(recipe, precision)
    elif empty is None:
        say("note: each rank reads all weights, since this model cannot be sent from rank 0 to the others")
    return model


def copy_without_weights(model: Any) -> bytes | None:
    """A loaded model, pickled: parameters on the meta device and tied as they are, buffers with their values.

    None where that is impossible: its weights are quantized, or a part of it has no name to be pickled by, which pickle
    may notice only as it reads.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    empty = {id(each): _without_values(each) for each in model.parameters()}
    try:
        pickled = pickle.dumps(copy.deepcopy(model, empty))
        pickle.loads(pickled)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
    return pickled


def take_weights(model: Any) -> dict[str, torch.Tensor]:
    """Leave a model's parameters on the meta device, so that FSDP shards without values, and return its weights.

    Accelerate tells the optimizer's parameters apart by their addresses, which meta tensors do not have.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    empty = {parameter: _without_values(parameter) for parameter in model.parameters()}
    for number, parameter in enumerate(empty.values()):
        parameter.data_ptr = functools.partial(int, number)  # type: ignore[method-assign]
    _replace(model, empty)
    return weights


def send_weights(model: Any, optimizer: Any, weights: dict[str, torch.Tensor], offload: Any) -> None:
    """Fill the shards of a model that FSDP sharded without values; every rank calls it.

    Rank 0 lets go of each tensor as it is sent.

    Args:
        optimizer: whose parameters are the model's.
        weights: what `take_weights` returned; rank 0's are sent, and the dictionary is empty at the end.
        offload: FSDP's policy of offloading; the shards lie in host memory under `CPUOffloadPolicy`.
    """
    shards: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for name, empty in fsdp2_canonicalize_names(dict(model.named_parameters())).items():
        mesh, weight = empty.device_mesh, weights.pop(name)
        if weight.is_meta:
            weight = torch.empty(empty.shape, dtype=empty.dtype, device=mesh.device_type)
        shard: torch.Tensor = distribute_tensor(weight.to(mesh.device_type, empty.dtype), mesh, empty.placements)
        if isinstance(offload, CPUOffloadPolicy):
            shard = shard.to("cpu")
        shards[empty] = torch.nn.Parameter(shard, empty.requires_grad)
    _replace(model, shards)
    for group in optimizer.param_groups:
        group["params"] = [shards[empty] for empty in group["params"]]


def _without_values(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _replace(model: Any, by_old: dict[torch.nn.Parameter, torch.nn.Parameter]) -> None:
    """Put other parameters into a model, at each place that one has: tied ones stay one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = by_old[parameter]
