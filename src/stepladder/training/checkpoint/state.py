"""The trainable weights and their optimizer state by parameter name: the part of each that a rank holds.

A part is a range of the flattened unsharded tensor, whatever the strategy: FSDP shards by rows, ZeRO-3 in equal parts,
ZeRO-1 and 2 wherever the flat buffer of all weights is cut. This makes a checkpoint independent of the strategy and of
the number of ranks, and lets each rank save and load its part without the others.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Read = Callable[[int, int], torch.Tensor]  # the elements of an unsharded, flattened tensor from one index to another

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


class _ZeroScaler:
    """DeepSpeed's fp16 loss scaler, with the interface of torch's."""

    def __init__(self, scaler: Any):
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.scaler).items() if isinstance(value, int | float)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        vars(self.scaler).update(saved)


def loss_scaler(trainer: Any) -> Any:
    """The loss scaler of fp16; None without fp16."""
    if not trainer.args.fp16:
        return None
    if trainer.is_deepspeed_enabled:
        return _ZeroScaler(trainer.model_wrapped.optimizer.loss_scaler)
    return trainer.accelerator.scaler


class Piece(NamedTuple):
    """A rank's part of a tensor.

    Attributes:
        values: of any shape; of a part the flattened elements.
        start: index of the first one in the unsharded, flattened tensor.
        shape: of the unsharded tensor.
        sharded: whether other ranks hold other parts; if not, all ranks hold the same.
    """

    values: torch.Tensor
    start: int
    shape: tuple[int, ...]
    sharded: bool


class Trained(abc.ABC):
    """The trained parameters by name, and their optimizer."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        self.parameters, self.optimizer = parameters, optimizer

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the unsharded parameter."""
        return tuple(self.parameters[name].shape)

    def put_weights(self, name: str, value: torch.Tensor) -> None:
        """Put an unsharded tensor into a parameter; every rank calls it."""
        self.fill_weights(name, lambda start, stop: value.flatten()[start:stop])

    @abc.abstractmethod
    def fill_weights(self, name: str, read: Read) -> None:
        """Put into a parameter what `read` gives of an unsharded one; every rank calls it, in the same order."""


class Plain(Trained):
    """One process, DDP, and FSDP, whose parameters and states are DTensors."""

    def pieces(self, name: str) -> Iterator[tuple[str, Piece]]:
        """The weights (by the key WEIGHT), then each of the optimizer's states; numbers as 0-d tensors."""
        parameter = self.parameters[name]
        yield WEIGHT, _piece(parameter.detach())
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if value is not None:
                yield key, _piece(value)

    def fill_weights(self, name: str, read: Read) -> None:
        _fill(self.parameters[name].data, read)

    def put_states(self, states: Mapping[str, Mapping[str, Read]]) -> None:
        """Put the optimizer's states back, which `states[name][key]` reads.

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
                _put(self.optimizer.state[parameter], key, read)


class Zero(Trained):
    """DeepSpeed's ZeRO stages 1 to 3, with or without offloading.

    The weights are ZeRO's fp32 ones, from which the model's own are derived.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], zero: Any):
        super().__init__(parameters, zero.optimizer)
        self.zero = zero
        self.sharded = any(hasattr(parameter, "ds_id") for parameter in parameters.values())  # stage 3
        self.flat = zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups
        self._link()

    def _link(self) -> None:
        """Link each parameter to its part of the optimizer's states, under ZeRO-1 and 2.

        DeepSpeed (0.19.8) does so after the first step of the first parameter group, when the other
        groups have no state yet, so that reading the states of their parameters fails.
        """
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        if not self.sharded:
            for parameters, flat in zip(self.zero.bit16_groups, self.flat, strict=True):
                if flat in self.optimizer.state:
                    lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def shape(self, name: str) -> tuple[int, ...]:
        parameter: Any = self.parameters[name]
        return tuple(parameter.ds_shape if self.sharded else parameter.shape)

    def pieces(self, name: str) -> Iterator[tuple[str, Piece]]:
        """As `Plain.pieces`."""
        yield WEIGHT, self._piece(name, None)
        for key, value in self.optimizer.state.get(self.flat[0], {}).items():
            if isinstance(value, torch.Tensor) and value.dim():
                yield key, self._piece(name, key)
            else:  # a number, the same for all parameters: Adam's `step`
                yield key, _piece(value)

    def fill_weights(self, name: str, read: Read) -> None:
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameter: Any = self.parameters[name]
        self._fill(name, None, read)
        if self.sharded and parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
            start, stop = self._bounds(name)
            parameter.ds_tensor.data[: stop - start].copy_(read(start, stop))
            return
        shape = self.shape(name)
        value = read(0, math.prod(shape)).view(shape)
        if not self.sharded:
            parameter.data.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # one that is small, and kept gathered
            parameter.data.copy_(value)

    def put_states(self, states: Mapping[str, Mapping[str, Read]]) -> None:
        """As `Plain.put_states`; numbers are the same for all parameters under ZeRO."""
        if not any(states.values()):  # each step so far was skipped: a step here would count as one
            return
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
        made = self.optimizer.state.get(self.flat[0], {})
        numbers = {key for key, value in made.items() if not (isinstance(value, torch.Tensor) and value.dim())}
        for name in self.parameters:
            for key, read in states.get(name, {}).items():
                if key not in numbers:
                    self._fill(name, key, read)
                    continue
                for flat in self.flat:
                    _put(self.optimizer.state[flat], key, read)

    def _piece(self, name: str, key: str | None) -> Piece:
        start, stop = self._bounds(name)
        return Piece(self._part(name, key).detach()[: stop - start], start, self.shape(name), True)

    def _part(self, name: str, key: str | None) -> torch.Tensor:
        """This rank's part of a parameter's fp32 weights (key None) or states, which shares their memory.

        DeepSpeed's own `safe_get_local_fp32_param` copies offloaded ones to the device.
        """
        parameter: Any = self.parameters[name]
        if not self.sharded:
            mapping = parameter._hp_mapping
            return mapping.get_hp_fragment(key) if mapping else torch.empty(0)
        group, start, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self.flat[group]
        return (flat if key is None else self.optimizer.state[flat][key]).narrow(0, start, size)

    def _bounds(self, name: str) -> tuple[int, int]:
        """The first index of this rank's part, and the one after the last."""
        parameter: Any = self.parameters[name]
        if not self.sharded:
            address = parameter._hp_mapping and parameter._hp_mapping.lp_fragment_address
            return (address.start, address.start + address.numel) if address else (0, 0)
        # ZeRO-3 pads to a multiple of the ranks: the last parts may be shorter than the others, or empty.
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
        return min(size * rank, parameter.ds_numel), min(size * (rank + 1), parameter.ds_numel)

    def _fill(self, name: str, key: str | None, read: Read) -> None:
        start, stop = self._bounds(name)
        self._part(name, key).data[: stop - start].copy_(read(start, stop))


def _step_without_effect(optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _piece(value: Any) -> Piece:
    if isinstance(value, DTensor):
        if bounds := _bounds(value):
            mesh = value.device_mesh
            copies = [n for n, kind in enumerate(value.placements) if isinstance(kind, Replicate)]
            is_copy = any(mesh.get_local_rank(n) for n in copies)  # of a shard that another rank writes
            values = value.to_local().flatten()
            return Piece(values[:0] if is_copy else values, bounds[0], tuple(value.shape), True)
        # offloaded shards are gathered on the device of the collectives
        gathered: Any = value.to(value.device_mesh.device_type)
        value = gathered.full_tensor()
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return Piece(value, 0, tuple(value.shape), False)


def _bounds(tensor: DTensor) -> tuple[int, int] | None:
    """The indices between which a rank's elements lie in the flattened tensor; None where they are no range."""
    shards = [(n, kind) for n, kind in enumerate(tensor.placements) if not isinstance(kind, Replicate)]
    if len(shards) != 1 or type(shards[0][1]) is not Shard or shards[0][1].dim:
        return None
    mesh, dimension = tensor.device_mesh, shards[0][0]
    rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
    size = math.ceil(rows / mesh.size(dimension))  # as torch.chunk cuts
    first = min(size * mesh.get_local_rank(dimension), rows)
    bounds = width * first, width * min(first + size, rows)
    assert bounds[1] - bounds[0] == tensor.to_local().numel(), f"a shard of {tensor.shape} has another size"
    return bounds


def _put(states: dict[str, Any], key: str, read: Read) -> None:
    if isinstance(states[key], torch.Tensor):
        _fill(states[key], read)
    else:
        states[key] = type(states[key])(read(0, 1).item())


def _fill(target: torch.Tensor, read: Read) -> None:
    """Fill a tensor, which may be sharded, with its part of an unsharded one."""
    if isinstance(target, DTensor):
        local = target.to_local()
        if bounds := _bounds(target):
            local.copy_(read(*bounds).view(local.shape))
            return
        mesh, value = target.device_mesh, read(0, target.numel()).view(target.shape)
        shard = distribute_tensor(value.to(mesh.device_type), mesh, target.placements, src_data_rank=None)
        local.copy_(shard.to_local())
    else:
        target.copy_(read(0, target.numel()).view(target.shape))
