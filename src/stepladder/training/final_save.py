"""The trained weights on disk: gathered one tensor at a time, written by one rank as they come.

Accelerate's `get_state_dict`, which Transformers' `Trainer.save_model` takes, gathers the whole model into rank 0's
host memory, under FSDP for an adapter too, and under ZeRO-3 in 16 bits whatever was trained. Here a full model is
written in the dtype of the recipe under every strategy, and an adapter in fp32, without the base.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stepladder.model import initial_factors, weights
from stepladder.model.start import ADAPTER
from stepladder.training.checkpoint.state import WRAPPERS
from stepladder.training.launch import ranks

LIMIT = 5 * 10**9  # bytes of a file, as merge.py writes them
CODES = {getattr(torch, name): code for name, code in weights.CODES.items()} | {
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"
}  # fmt: skip
LAYER = re.compile(r"^.*?\.\d+\.")


def write_weights(trainer: Any, folder: Path) -> dict[str, str]:
    """Write the trained model or adapter with its configuration; every rank calls it, the first one writes.

    Returns:
        The model's name of each tensor in the files that is stored as the model holds it.
    """
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # its root keeps its parameters gathered after an evaluation
            module.reshard()
    live = {_without_wrappers(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    write = _write_adapter if isinstance(model, PeftModel) else _write_model
    return write(model, live, folder, trainer.args.should_save)


def _write_adapter(model: Any, live: dict[str, Any], folder: Path, writes: bool) -> dict[str, str]:
    virtual = model.active_peft_config.is_prompt_learning
    if virtual:  # one tensor, which is never sharded, and which PEFT reads from the model itself
        names = {"prompt_embeddings": next(name for name, tensor in live.items() if tensor.requires_grad)}
    else:  # PEFT renames whatever stands for the tensors, here their own names
        names = adapter_tensors(model, {name: name for name in live})
    tensors = {name: tensor.cpu() for name, tensor in _gather(names.values(), live) if writes}
    embeddings = _embeddings(model)
    if writes and initial_factors.is_decomposed(model):
        tensors = initial_factors.convert(tensors, names, folder)
    if writes:
        tensors = initial_factors.with_projections(tensors, model, folder)
        model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=embeddings)
        if initial_factors.is_decomposed(model):
            initial_factors.convert_config(folder)
        if virtual:  # which ZeRO holds in fewer bits
            save_file({key: tensors[name] for key, name in names.items()}, folder / ADAPTER, {"format": "pt"})
    return names


def adapter_tensors(model: Any, tensors: dict[str, Any] | None = None) -> dict[str, Any]:
    """An adapter's tensors by their names in its file, or what stands for them in `tensors`, by the model's names."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, tensors, save_embedding_layers=_embeddings(model)))


def _embeddings(model: Any) -> bool | str:
    """PEFT's `save_embedding_layers`: not where the vocabulary grew by rows that the adapter holds one by one."""
    return False if getattr(model.active_peft_config, "trainable_token_indices", None) else "auto"


def _write_model(model: Any, live: dict[str, Any], folder: Path, writes: bool) -> dict[str, str]:
    # Only a rank that has read the base's files knows which of its tensors have other names there.
    groups, renamed = ranks.from_first(_group(model, live) if writes else None)
    if not writes:
        for _ in _gather(itertools.chain(*groups), live):
            pass
        return {in_file: name for name, in_file in renamed.items()}
    # As it was loaded: what FSDP and ZeRO hold may differ.
    dtype = getattr(torch, weights.dtype_name(model.config.dtype), torch.float32)
    model.save_pretrained(str(folder), state_dict={})  # its configuration and code
    for file in folder.glob("model*.safetensors*"):  # of an attempt that was interrupted, too
        file.unlink()
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    dtypes = {name: _dtype_in_file(model, name, live[name], dtype) for name in itertools.chain(*groups)}

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A group's tensors as the files hold them."""
        if tensors.keys() <= renamed.keys():
            return {renamed[name]: tensor for name, tensor in tensors.items()}
        return _as_in_file(model, tensors)

    plan, remaining, held = {}, iter(groups), {}
    for group in groups:
        for name, tensor in convert({name: _stand_in(live[name], dtypes[name]) for name in group}).items():
            plan[name] = weights.Tensor("", CODES[tensor.dtype], tuple(tensor.shape))

    def produce(name: str) -> torch.Tensor:
        while name not in held:
            held.update(convert({name: tensor.to(dtypes[name]) for name, tensor in _gather(next(remaining), live)}))
        return held.pop(name)

    weights.write(folder, plan, produce, LIMIT, lambda done, total: None)
    return {in_file: name for name, in_file in renamed.items()}


def _group(model: Any, live: dict[str, Any]) -> tuple[list[list[str]], dict[str, str]]:
    """The model's tensors that are saved, in groups that the files hold fused, and the names there of all others.

    Transformers fuses and splits tensors of one layer at most (`conversion_mapping.py`), as a layer's experts.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    kept = {name: _stand_in(tensor, tensor.dtype) for name, tensor in live.items()}
    for name in model._keys_to_ignore_on_save or ():
        kept.pop(name, None)
    kept = remove_tied_weights_from_state_dict(kept, model)
    in_file = {id(tensor): name for name, tensor in _as_in_file(model, kept).items()}
    renamed = {name: in_file[id(tensor)] for name, tensor in kept.items() if id(tensor) in in_file}
    groups: dict[str, list[str]] = {}
    for name in kept:
        layer = LAYER.match(name)
        groups.setdefault(layer.group() if layer and name not in renamed else name, []).append(name)
    return list(groups.values()), renamed


def _as_in_file(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names, and fused or split, as the files of this kind of model hold them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def _stand_in(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that unsharded shape, without values."""
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=dtype, device="meta")


def _dtype_in_file(model: Any, name: str, tensor: Any, dtype: torch.dtype) -> torch.dtype:
    if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
        return tensor.dtype
    keeps = any(part in name for part in model._keep_in_fp32_modules_strict or ())
    return torch.float32 if keeps else dtype


def _gather(names: Iterable[str], live: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor unsharded, in turn; every rank asks for the same ones. Of trained weights ZeRO's fp32 copy."""
    for name in names:
        tensor = live[name]
        if isinstance(tensor, DTensor):  # an offloaded shard is gathered on the device of the collectives
            there: Any = tensor.detach().to(tensor.device_mesh.device_type)
            yield name, there.full_tensor()
        elif tensor.requires_grad and (hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")):
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(tensor)
        elif hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                yield name, tensor.detach().clone()
        else:
            yield name, tensor.detach()


def _without_wrappers(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
