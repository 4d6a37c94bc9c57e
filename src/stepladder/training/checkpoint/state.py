"""The trainable weights and their optimizer state by parameter name, unsharded, under any strategy.

This makes a checkpoint independent of the strategy and of the number of ranks. Both classes gather and put back
one parameter at a time, so no rank holds more than one unsharded; each call is collective: every rank makes
it, for the same parameter, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

WEIGHT = ""  # the key of the weights themselves, beside the optimizer's own (`exp_avg`, `step` …)
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # added by torch.compile and activation checkpointing


def trainable_state(trainer: Any) -> Plain | Zero:
    """The trained parameters and their optimizer state, by the strategy that has sharded them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for module in model.modules():
        # After a forward pass without a backward pass (an evaluation), FSDP's root still has its gathered
        # parameters: the optimizer has no state for them, and what is written into them is lost.
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            parameters[name] = parameter
    if trainer.is_deepspeed_enabled:
        return Zero(parameters, trainer.model_wrapped.optimizer)
    return Plain(parameters, trainer.optimizer.optimizer)


class Plain:
    """One process, DDP, and FSDP, whose parameters and states are DTensors."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        self.parameters, self.optimizer = parameters, optimizer

    def get(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights (by the key WEIGHT), then each of the optimizer's states; numbers as 0-d tensors."""
        parameter = self.parameters[name]
        yield WEIGHT, _whole(parameter.detach())
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if value is not None:
                yield key, _whole(value)

    def put_weights(self, name: str, value: torch.Tensor) -> None:
        _fill(self.parameters[name].data, value)

    def put_states(self, states: Mapping[str, Mapping[str, Callable[[], torch.Tensor]]]) -> None:
        """Put the optimizer's states back: `states[name][key]()` reads one, unsharded.

        The optimizer creates them itself, by a step without effect (as torch's own
        `distributed.checkpoint.state_dict` does), so that type, dtype and device are right; then they are
        filled. Call it before the weights are put back.
        """
        for name, parameter in self.parameters.items():
            parameter.grad = torch.zeros_like(parameter) if states.get(name) else None
        _step_without_effect(self.optimizer)
        for name, parameter in self.parameters.items():
            parameter.grad = None
            for key, read in states.get(name, {}).items():
                made = self.optimizer.state[parameter]
                if isinstance(made[key], torch.Tensor):
                    _fill(made[key], read())
                else:
                    made[key] = type(made[key])(read().item())


class Zero:
    """DeepSpeed's ZeRO stages 1 to 3, with or without offloading, by its documented API.

    The weights are ZeRO's fp32 ones, from which the model's own are derived.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], zero: Any):
        self.parameters, self.zero, self.optimizer = parameters, zero, zero.optimizer
        self.sharded = any(hasattr(parameter, "ds_id") for parameter in parameters.values())  # stage 3
        self.flat = zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups
        self._link()

    def _link(self) -> None:
        """Link each parameter to its part of the optimizer's states, under ZeRO-1 and 2.

        DeepSpeed (0.19.8) does so after the first step of the first parameter group, when the other
        groups have no state yet: `safe_get_full_optimizer_state` then fails for their parameters.
        """
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        if not self.sharded:
            for parameters, flat in zip(self.zero.bit16_groups, self.flat, strict=True):
                if flat in self.optimizer.state:
                    lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def get(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        yield WEIGHT, safe_get_full_fp32_param(parameter)
        for key, value in self.optimizer.state.get(self.flat[0], {}).items():
            if isinstance(value, torch.Tensor) and value.dim():
                yield key, safe_get_full_optimizer_state(parameter, key)
            else:  # a number, the same for all parameters: Adam's `step`
                yield key, _whole(value)

    def put_weights(self, name: str, value: torch.Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter = self.parameters[name]
        value = value.to(self.flat[0].dtype)
        if not self.sharded:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
            parameter.data.copy_(value)
            return
        safe_set_local_fp32_param(parameter, self._share(parameter, value))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def put_states(self, states: Mapping[str, Mapping[str, Callable[[], torch.Tensor]]]) -> None:
        """As `Plain.put_states`; numbers are the same for all parameters under ZeRO."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        kept = [flat.grad for flat in self.flat]
        for flat in self.flat:
            flat.grad = torch.zeros_like(flat)
        if self.sharded:  # as ZeRO-3 does: one sub-group at a time is in the optimizer
            for number, flat in enumerate(self.flat):
                group = self.optimizer.param_groups[self.zero.sub_group_to_group_id[number]]
                group["params"] = [flat]
                _step_without_effect(self.optimizer)
                group["params"] = []
        else:
            _step_without_effect(self.optimizer)
        for flat, gradient in zip(self.flat, kept, strict=True):
            flat.grad = gradient
        self._link()
        for name, parameter in self.parameters.items():
            for key, read in states.get(name, {}).items():
                value = read()
                if not value.dim():
                    for flat in self.flat:
                        made = self.optimizer.state[flat]
                        if isinstance(made[key], torch.Tensor):
                            made[key].fill_(value)
                        else:
                            made[key] = type(made[key])(value.item())
                elif self.sharded:
                    safe_set_local_optimizer_state(parameter, self._share(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _share(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of an unsharded tensor. ZeRO-3 pads to a multiple of the ranks, which its own
        `safe_set_full_…` functions do not: they fail for other sizes.
        """
        size = parameter.ds_tensor.numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        share = torch.zeros(size, dtype=value.dtype)
        part = value.flatten()[start : start + size]
        share[: part.numel()] = part
        return share.to(parameter.ds_tensor.device)


def _step_without_effect(optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _whole(value: Any) -> torch.Tensor:
    if isinstance(value, DTensor):  # offloaded shards are gathered on the device of the collectives
        there: Any = value.to(value.device_mesh.device_type)
        return there.full_tensor()
    if isinstance(value, torch.Tensor):
        return value if value.dim() else value.clone()  # ZeRO shares one `step`, and safetensors refuses shared tensors
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy an unsharded tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        shard = distribute_tensor(value.to(mesh.device_type), mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(value)
