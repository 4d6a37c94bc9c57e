"""An adapter folded into its base, one module at a time, by PEFT's own arithmetic.

The base's tensors stay on disk: the model is built on the meta device, PEFT puts the adapter's
layers into it, and each module that the adapter touches gets its weights for the moment in which
PEFT's `merge` needs them. The arithmetic is in fp32, rounded once to the output's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.errors import ModelError
from stepladder.model import quantized, weights
from stepladder.model.weights import CODES, Tensor, Weights

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before each name of the base model
# These begin by changing the base's weights (PiSSA keeps what its factors leave over), so that
# PEFT must see the whole model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva", "mica")


def configs(adapters: list[Path]) -> list[PeftConfig]:
    """The adapters' configurations.

    Raises:
        ModelError: no adapter, a pickled one, or a kind that cannot become weights.
    """
    from peft import PeftConfig

    found = []
    for folder in adapters:
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is no adapter: it has no adapter_config.json", way_out="check the path")
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ModelError(
                f"{folder} is {config.peft_type.value}, which cannot be merged",
                why="it learned tokens that come before the prompt, not a change of the base's weights",
                way_out=f'serve base and adapter together: python scripts/generate.py --model {folder} --prompt "…"',
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"{folder} is an activated LoRA, which cannot be merged",
                why="it applies to the tokens after its invocation only",
                way_out="serve base and adapter together",
            )
        Weights(folder, single=ADAPTER)
        found.append(config)
    return found


def whole_because(configs: list[PeftConfig]) -> str | None:
    """Why these adapters need the whole model in memory; None where they can be streamed."""
    for config in configs:
        if config.peft_type.value != "LORA":
            return f"{config.peft_type.value} is not merged module by module"
        if str(config.init_lora_weights).startswith(CHANGES_BASE):
            return f"init_lora_weights: {config.init_lora_weights} changes the base's own weights"
        if config.target_parameters or config.layer_replication:
            return "target_parameters and layer_replication change more than single modules"
    return None


class Merge:
    """Adapters on a base of which no more than one module is in memory.

    Args:
        base: the folder of the base model.
        adapters: the adapters' folders.
        scales: each adapter's weight; the change is the sum of their changes, each by its weight.
        quantize: takes a weight to 4 bits and back, where the adapter goes onto the weights that it saw in
            training (model/quantized.py); None leaves those of `base` as they are.
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
        from transformers import AutoConfig

        self.disk, self.quantize, self.device = Weights(base), quantize, device
        self.config = AutoConfig.from_pretrained(base)
        self.given: dict[str, torch.Tensor] = {}  # weights of the base that an adapter replaces outright
        self._last: dict[str, torch.Tensor] = {}
        self._streaming = False
        files = [Weights(folder, single=ADAPTER) for folder in adapters]
        model = self._bare()
        text, rows = self.config.get_text_config(), self._vocabulary(model, files, tokens)
        if text.vocab_size != rows:
            text.vocab_size = rows
            model = self._bare()
        self.names = {module: name for name, module in model.named_modules()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.keys = weights.keys(model, self.disk)
        self.quantized = quantized.names(model) if quantize else {}
        self.peft = self._adapt(model, adapters, files, scales)
        self.units = dict(self._units())
        self._check_shapes()
        self.untied = self._untied()
        if self.untied:
            self.config.tie_word_embeddings = False

    # ---- building ----

    def _vocabulary(self, model: Any, files: list[Weights], tokens: int) -> int:
        """Rows of the embeddings: the base's, unless the adapter was trained on more (or fewer)."""
        rows = int(model.get_input_embeddings().weight.shape[0])
        ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        names = [name for name, module in model.named_modules() if module in ends]
        for file in files:
            for name in names:
                for suffix in (".weight", ".base_layer.weight"):
                    if found := file.tensors.get(f"{PREFIX}{name}{suffix}"):
                        return found.shape[0]
        return max(rows, tokens)

    def _adapt(self, model: Any, adapters: list[Path], files: list[Weights], scales: list[float]) -> PeftModel:
        """Put PEFT's layers into the model and the adapters' tensors into them, in fp32."""
        from peft import get_peft_model, get_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from safetensors.torch import load_file

        names = [f"adapter_{number}" for number in range(len(adapters))]
        wrapped: Any = None
        for name, folder, config, file, scale in zip(names, adapters, configs(adapters), files, scales, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about tied weights: they are untied here where they must be
                try:
                    if wrapped is None:
                        wrapped = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
                    else:
                        wrapped.add_adapter(name, config, low_cpu_mem_usage=True)
                except ValueError as error:
                    raise _mismatch(folder, self.disk.folder, str(error).splitlines()[0]) from None
                # PEFT's own table of names, in the file and in the model, for the asking: it moves
                # whatever stands for the tensors, here their names.
                state = wrapped.state_dict()
                table: dict[str, str] = get_peft_model_state_dict(
                    wrapped, {key: key for key in state}, name, save_embedding_layers=False
                )
            values = load_file(folder / ADAPTER)  # one opening for hundreds of small tensors
            self._given(folder, values, values.keys() - table.keys())
            if missing := sorted(table.keys() - file.tensors.keys()):
                raise _mismatch(folder, self.disk.folder, f"the adapter lacks {missing[0]}{weights.more(missing)}")
            loaded: dict[str, torch.Tensor] = {}
            for key, own in table.items():
                if file.tensors[key].shape != tuple(state[own].shape):
                    raise _mismatch(
                        folder,
                        self.disk.folder,
                        f"{key} is {_by(file.tensors[key].shape)}, and this base needs {_by(state[own].shape)}",
                    )
                loaded[own] = self._finite(folder, key, values.pop(key))
            wrapped.load_state_dict(loaded, strict=False, assign=True)
            for layer in wrapped.modules():
                if hasattr(layer, "set_scale") and scale != 1:
                    if isinstance(layer, BaseTunerLayer) and name in layer.lora_variant:
                        raise ModelError(f"{folder} is DoRA, which has no weight: its change is not a sum")
                    layer.set_scale(name, scale)
        if len(names) > 1:
            try:
                wrapped.base_model.set_adapter(names, inference_mode=True)
            except ValueError as error:
                raise ModelError("these adapters cannot be merged together", why=str(error).splitlines()[0]) from None
        return wrapped.eval()

    def _finite(self, folder: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device).float()
        if not tensor.isfinite().all():
            raise ModelError(f"{key} holds numbers that are not finite", where=str(folder), way_out="train it again")
        return tensor

    def _given(self, folder: Path, values: dict[str, torch.Tensor], extra: set[str]) -> None:
        """Keep the base's own weights that came with the adapter: embeddings of a vocabulary that grew."""
        for key in sorted(extra):
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name not in self.shapes:
                raise _mismatch(folder, self.disk.folder, f"there is no place in it for {key}{weights.more(extra)}")
            self.given[name] = self._finite(folder, key, values[key])

    def _units(self) -> Iterator[tuple[str, Any]]:
        """Each weight of the base that changes, by its name, with the PEFT layer that changes it."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        for module in self.peft.modules():
            if isinstance(module, ModulesToSaveWrapper):
                held = module.original_module
            elif isinstance(module, BaseTunerLayer):
                held = module.get_base_layer()
            else:
                continue
            for own, _ in held.named_parameters():
                # A LoRA layer changes a bias only where it has learned one.
                if own == "bias" and isinstance(module, BaseTunerLayer) and not any(module.lora_bias.values()):
                    continue
                yield f"{self.names[held]}.{own}", module

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
                    way_out="name the base that the adapter was trained on: --base",
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
                weights.load(held, self.read)
                try:
                    unit.merge(adapter_names=list(unit.active_adapters))
                except (ValueError, RuntimeError, NotImplementedError) as error:
                    raise ModelError(f"PEFT cannot merge {held[0][0]}", why=str(error)) from None
                self._last = {
                    f"{place}.{own}": p.data for place, m in held for own, p in m._parameters.items() if p is not None
                }
                unit.merged_adapters.clear()
                weights.unload(held)
        return self._last[name]

    def reference(self) -> PeftModel:
        """Base and adapter side by side, in fp32, each module's weights fetched as it is called."""
        if not self._streaming:
            weights.stream(self.peft, self.names, self.read)
            self._streaming = True
        return self.peft

    def exact(self) -> PreTrainedModel:
        """The merged model before it is rounded and written."""
        return self._streamed(self.merged)

    def opened(self, folder: Path) -> PreTrainedModel:
        """The merged model as it was written."""
        disk = Weights(folder)
        keys = weights.keys(self._bare(), disk)
        return self._streamed(lambda name: disk.read(keys.get(name) or keys[self.tied[name]]).to(self.device).float())

    def _streamed(self, read: weights.Read) -> PreTrainedModel:
        model = self._bare()
        weights.stream(model, {module: name for name, module in model.named_modules()}, read)
        return model

    def _bare(self) -> PreTrainedModel:
        return weights.skeleton(self.config, self.device)

    # ---- the result ----

    def plan(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What will be written, under the names that the base has on disk; what is not a weight stays as it is."""
        code, found = CODES[_name(dtype)], dict(self.disk.tensors)
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
                raise ModelError(f"{key} is too large for {_name(dtype)}", way_out="--dtype bf16 or fp32")
            return tensor.to(dtype)

        count = weights.write(folder, plan, produce, limit, progress)
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        return count


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(adapter: Path, base: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit this base: {what}",
        where=str(adapter),
        why=f"it was trained on another model than {base}, or on another size of it",
        way_out="name the base that it was trained on: --base",
    )


def _by(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)
