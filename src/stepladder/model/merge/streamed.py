"""An adapter folded into its base, one module at a time, by PEFT's own arithmetic.

The model is built on the meta device, PEFT puts the adapter's layers into it, and each module that the adapter changes
gets its weights while PEFT's `merge` needs them. The arithmetic is in fp32, rounded once to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.errors import ModelError
from stepladder.model import load
from stepladder.model.merge import injection, quantized, weights
from stepladder.model.merge.weights import CODES, Tensor, Weights, more

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

Read = Callable[[str], "torch.Tensor"]
Held = list[tuple[str, "torch.nn.Module"]]  # modules with their names in the base model


class Merge:
    """Adapters on a base of which no more than one module is in memory.

    Args:
        base: the folder of the base model.
        adapters: the adapters' folders.
        scales: each adapter's weight; the change is the sum of their changes, each by its weight.
        quantize: takes a weight to 4 bits and back, where the adapter goes onto the weights that it saw in
            training (merge/quantized.py); None leaves those of `base` as they are.
        tokens: the tokenizer's length; tokens beyond the base's vocabulary must come with the adapter.

    Raises:
        ModelError: adapter and base do not match, or the adapter is broken.
    """

    def __init__(
        self,
        base: Path,
        adapters: list[Path],
        scales: list[float],
        quantize: quantized.RoundTrip | None = None,
        tokens: int = 0,
        device: str = "cpu",
    ):
        self.disk, self.quantize, self.device = Weights(base), quantize, device
        self.config = load.config_of(base)
        self._last: dict[str, torch.Tensor] = {}
        self._streaming = False
        model = self._bare()
        text, rows = self.config.get_text_config(), injection.vocabulary(model, adapters, tokens)
        if text.vocab_size != rows:
            text.vocab_size = rows
            model = self._bare()
        self.names = {module: name for name, module in model.named_modules()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.keys = _keys(model, self.disk)
        self.quantized = quantized.names(model) if quantize else {}
        self.peft, self.given = injection.inject(model, base, adapters, scales, device)
        self.units = dict(self._units())
        self._check_shapes()
        self.untied = self._untied()
        if self.untied:
            self.config.tie_word_embeddings = False

    # ---- building ----

    def _units(self) -> Iterator[tuple[str, Any]]:
        """Each weight of the base that changes, by its name, with the PEFT layer that changes it."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        for module in self.peft.modules():
            if isinstance(module, ModulesToSaveWrapper):
                for own, _ in module.original_module.named_parameters():
                    yield f"{self.names[module.original_module]}.{own}", module
            elif isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer()
                for own, _ in layer.named_parameters():
                    # It changes a bias only where it has learned one.
                    if own != "bias" or any(getattr(module, "lora_bias", {}).values()):
                        yield f"{self.names[layer]}.{own}", module

    def _check_shapes(self) -> None:
        """Every weight must have the size of its place, or be given by the adapter."""
        from peft.utils.other import ModulesToSaveWrapper

        for name, shape in self.shapes.items():
            key = self._key(name)
            disk = self.disk.tensors[key].shape
            replaced = name in self.given or isinstance(self.units.get(name), ModulesToSaveWrapper)
            if disk != shape and not replaced and not self._new_rows_trained(name, disk[0], shape[0]):
                raise ModelError(
                    f"the vocabularies differ: the base's {key} has {disk[0]:,} rows, the adapter's {shape[0]:,}",
                    where=str(self.disk.folder),
                    why="the adapter's tokenizer has tokens that neither the base nor the adapter has embeddings for",
                    help="name the base that the adapter was trained on: --base",
                )

    def _new_rows_trained(self, name: str, old: int, new: int) -> bool:
        indices = getattr(self.units.get(self.tied.get(name, name)), "token_indices", {})
        return old < new and set(range(old, new)) <= {row for rows in indices.values() for row in rows}

    def _untied(self) -> bool:
        """Whether input and output embeddings, one tensor in the base, are two after the merge."""
        import torch

        def same(name: str, other: str) -> bool:
            return torch.equal(self.merged(name), self.merged(other))

        changed = self.units.keys() | self.given.keys()
        return any(not same(*pair) for pair in self.tied.items() if changed & {*pair})

    # ---- weights, in fp32 ----

    def _key(self, name: str) -> str:
        return self.keys[name] if name in self.keys else self.keys[self.tied[name]]

    def read(self, name: str) -> torch.Tensor:
        """A weight of the base as the adapter sees it."""
        import torch

        tied = self.tied.get(name, name)
        if name in self.given or tied in self.given:
            return self.given[name if name in self.given else tied].clone()
        tensor = self.disk.read(self._key(name)).to(self.device)
        if self.quantize and name in self.quantized:
            tensor = self.quantize(tensor, self.quantized[name])
        tensor = tensor.float()
        rows = self.shapes[name][0] - tensor.shape[0]
        if rows > 0:
            tensor = torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])
        return tensor

    def merged(self, name: str) -> torch.Tensor:
        """The same weight with the adapter folded in."""
        from peft.utils.other import ModulesToSaveWrapper

        unit = self.units.get(name)
        if unit is None:
            return self.read(name)
        if name not in self._last:
            self._last = {}  # at most one unit's weights are held
            if isinstance(unit, ModulesToSaveWrapper):
                place = self.names[unit.original_module]
                (active,) = unit.active_adapters
                self._last = {f"{place}.{own}": p.data for own, p in unit.modules_to_save[active].named_parameters()}
            else:
                held = [(self.names[m], m) for m in unit.get_base_layer().modules()]
                _load(held, self.read)
                try:
                    unit.merge(adapter_names=list(unit.active_adapters))
                except (ValueError, RuntimeError, NotImplementedError) as error:
                    raise ModelError(f"PEFT cannot merge {held[0][0]}", why=str(error)) from None
                self._last = {
                    f"{place}.{own}": p.data for place, m in held for own, p in m._parameters.items() if p is not None
                }
                unit.merged_adapters.clear()
                _unload(held)
        return self._last[name]

    def configuration(self) -> PretrainedConfig:
        """The merged model's."""
        return self.config

    def reference(self) -> PeftModel:
        """Base and adapter side by side, in fp32, each module's weights fetched as it is called."""
        if not self._streaming:
            _stream(self.peft, self.names, self.read)
            self._streaming = True
        return self.peft

    def exact(self) -> PreTrainedModel:
        """The merged model before it is rounded and written."""
        return self._streamed(self.merged)

    def reopen(self, folder: Path) -> PreTrainedModel:
        """The merged model as it was written."""
        disk = Weights(folder)
        keys = _keys(self._bare(), disk)
        return self._streamed(lambda name: disk.read(keys.get(name) or keys[self.tied[name]]).to(self.device).float())

    def _streamed(self, read: Read) -> PreTrainedModel:
        model = self._bare()
        _stream(model, {module: name for name, module in model.named_modules()}, read)
        return model

    def _bare(self) -> PreTrainedModel:
        return skeleton(self.config, self.device)

    # ---- the result ----

    def plan(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What will be written, under the names that the base has on disk; what is not a weight stays as it is."""
        code, found = CODES[weights.name_of(dtype)], dict(self.disk.tensors)
        for key, name in self._written().items():
            found[key] = Tensor("", code, self.shapes[name])
        return found

    def _written(self) -> dict[str, str]:
        """The model's name of each weight by its key in the output."""
        names = {key: name for name, key in self.keys.items()}
        return names | {name: name for name in self.tied if self.untied and name not in self.keys}

    def targeted(self) -> dict[str, str]:
        """The tensors that may differ from the base's, by key, and their names in the model."""
        changed = self.units.keys() | self.given.keys() | self.quantized.keys()
        for pair in self.tied.items():
            if changed & {*pair}:
                changed |= {*pair} if not self.untied else {*pair} - self.keys.keys()
        return {key: name for key, name in self._written().items() if name in changed}

    def write(self, folder: Path, dtype: torch.dtype, limit: int, progress: Callable[[int, int], None]) -> int:
        """Write the merged weights and the configuration; returns the number of shards.

        Raises:
            ModelError: a weight overflows `dtype`.
        """
        import torch

        names, plan, targeted = self._written(), self.plan(dtype), self.targeted()

        def produce(key: str) -> torch.Tensor:
            if key not in targeted and plan[key].dtype == self.disk.tensors[key].dtype:
                return self.disk.read(key)
            tensor = self.merged(names[key])
            low, high = tensor.aminmax()
            if not max(-low, high) <= torch.finfo(dtype).max:  # NaN too
                raise ModelError(f"{key} is too large for {weights.name_of(dtype)}", help="--dtype bf16 or fp32")
            return tensor.to(dtype)

        count = weights.write(folder, plan, produce, limit, progress)
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        return count


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


def _keys(model: PreTrainedModel, disk: Weights) -> dict[str, str]:
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


def _load(held: Held, read: Read) -> None:
    """Give modules on the meta device their own parameters."""
    import torch

    for name, module in held:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, own, torch.nn.Parameter(read(f"{name}.{own}"), requires_grad=False))


def _unload(held: Held) -> None:
    import torch

    for _, module in held:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, own, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), False))


def _stream(model: torch.nn.Module, names: dict[torch.nn.Module, str], read: Read) -> None:
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
            module.register_forward_pre_hook(lambda *_, held=held: _load(held, read))
            module.register_forward_hook(lambda *_, held=held: _unload(held))
