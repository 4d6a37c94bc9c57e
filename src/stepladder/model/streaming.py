"""A model whose weights are in memory only while a module needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stepladder.errors import ModelError
from stepladder.model.weights import Weights, more

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class NotStreamed(Exception):
    """The tensors on disk are not the model's, one by one."""


def skeleton(config: object, device: str = "cpu") -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers on `device`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def keys(model: PreTrainedModel, disk: Weights) -> dict[str, str]:
    """Names on disk by the model's names; Transformers renames some as it loads.

    Raises:
        NotStreamed: it fuses some, too, as experts are.
        ModelError: a tensor is missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
    state, tied, found = model.state_dict(), model.all_tied_weights_keys, {}
    for key in disk.tensors:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted:
            raise NotStreamed(f"{key} is fused with others as Transformers loads it")
        if name in state:
            found[name] = key
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if missing := [name for name in wanted if name not in found and tied.get(name) not in found]:
        raise ModelError(
            f"the base has no tensor {missing[0]}{more(missing)}",
            where=str(disk.folder),
            why="the folder is not whole, or config.json belongs to another model",
        )
    return found


Read = Callable[[str], "torch.Tensor"]
Held = list[tuple[str, "torch.nn.Module"]]  # modules with their names in the base model


def load(held: Held, read: Read) -> None:
    """Give modules on the meta device their own parameters."""
    import torch

    for name, module in held:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, own, torch.nn.Parameter(read(f"{name}.{own}"), requires_grad=False))


def unload(held: Held) -> None:
    import torch

    for _, module in held:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, own, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), False))


def stream(model: torch.nn.Module, names: dict[torch.nn.Module, str], read: Read) -> None:
    """Let each module fetch its weights as it is called, and drop them when it has answered.

    A tuner layer may read its base layer's weight without calling it, as DoRA's does, so the
    base layer's weights come and go with the tuner layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    within: set[torch.nn.Module] = set()
    for module in model.modules():
        if module in within:
            continue
        modules = [module]
        if isinstance(module, BaseTunerLayer):
            modules = [*module.get_base_layer().modules()]
            within.update(modules)
        held = [(names[m], m) for m in modules if m in names and m._parameters]
        if held:
            module.register_forward_pre_hook(lambda *_, held=held: load(held, read))
            module.register_forward_hook(lambda *_, held=held: unload(held))
