"""A model without weights, which are read from disk as each module needs them, and an adapter's layers in it.

Parameters are on the meta device; PEFT puts the adapters' layers into the model, with their tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import installation
from stepladder.console import quote_for_shell
from stepladder.errors import ModelError, first_line
from stepladder.model import fixed_values, module_patterns
from stepladder.model.pretrained import wrong_base
from stepladder.model.start import ADAPTER, ADAPTER_CONFIG, invalid_config, read_config
from stepladder.model.weights import Weights, more, read_adapter

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

Read = Callable[[str], "torch.Tensor"]
Held = list[tuple[str, "torch.nn.Module"]]  # modules with their names in the base model
PREFIX = "base_model.model."  # PEFT's, before each name of the base model


class NotStreamed(Exception):
    """The tensors on disk are not the model's, one by one."""


def make_skeleton(config: object, device: str = "cpu") -> PreTrainedModel:
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


def map_keys(model: PreTrainedModel, disk: Weights) -> dict[str, str]:
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
    state, tied, keys = model.state_dict(), model.all_tied_weights_keys, {}
    for key in disk.tensors:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted:
            raise NotStreamed(f"{key} is fused with others as Transformers loads it")
        if name in state:
            keys[name] = key
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if missing := [name for name in wanted if name not in keys and tied.get(name) not in keys]:
        raise ModelError(
            f"the base has no tensor {missing[0]}{more(missing)}",
            where=str(disk.folder),
            why="the folder is not whole, or config.json belongs to another model",
        )
    return keys


def fill(held: Held, read: Read | None) -> None:
    """Give modules their own parameters; without `read` these go back to the meta device."""
    import torch

    for name, module in held:
        for part, parameter in module._parameters.items():
            if parameter is not None:
                tensor = read(f"{name}.{part}") if read else torch.empty_like(parameter, device="meta")
                setattr(module, part, torch.nn.Parameter(tensor, requires_grad=False))


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
            module.register_forward_pre_hook(lambda *_, held=held: fill(held, read))
            module.register_forward_hook(lambda *_, held=held: fill(held, None))


# ---- adapters ----


def read_configs(adapters: list[Path]) -> list[PeftConfig]:
    """The adapters' configurations.

    Raises:
        ModelError: no adapter, a pickled one, or a kind that cannot become weights.
    """
    from peft import PeftConfig

    configs = []
    for folder in adapters:
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{folder} is no adapter: it has no adapter_config.json", help="check the path")
        read_config(folder)
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:  # KeyError: a peft_type that it does not know
            raise invalid_config(folder / ADAPTER_CONFIG, f"{type(error).__name__}: {error}") from None
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ModelError(
                f"{folder} is {config.peft_type.value}, which cannot be merged",
                why="it learned tokens that come before the prompt, not a change of the base's weights",
                help="serve base and adapter together: "
                f'{installation.command("generate")} --model {quote_for_shell(folder)} --prompt "…"',
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"{folder} is an activated LoRA, which cannot be merged",
                why="it applies to the tokens after its invocation only",
                help="serve base and adapter together",
            )
        if len(adapters) > 1 and getattr(config, "trainable_token_indices", None):
            raise ModelError(
                f"{folder} cannot be merged together with another adapter",
                why="it replaces rows of the embeddings, which is not a sum",
                help="merge one of them, and the other one with --base and that result",
            )
        Weights(folder, single=ADAPTER)
        configs.append(config)
    return configs


def count_rows(model: PreTrainedModel, adapters: list[Path], tokens: int) -> int:
    """Rows of the embeddings: the base's, unless an adapter was trained on more (or fewer), or has more tokens."""
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    names = [name for name, module in model.named_modules() if module in ends]
    for folder in adapters:
        tensors = Weights(folder, single=ADAPTER).tensors
        for name in names:
            for suffix in (".weight", ".base_layer.weight"):
                if embeddings := tensors.get(f"{PREFIX}{name}{suffix}"):
                    return embeddings.shape[0]
    return max(int(ends[0].weight.shape[0]), tokens)


def inject(
    model: PreTrainedModel, base: Path, adapters: list[Path], scales: list[float], device: str
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The model with all adapters active, their tensors in fp32, and the base's weights that they replace outright.

    Those are embeddings of a vocabulary that grew, and biases (`bias: all`), by their names in the base.

    Raises:
        ModelError: adapter and base do not match, or the adapter is broken.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    names = [f"adapter_{number}" for number in range(len(adapters))]
    modules = [name for name, _ in model.named_modules()]
    replaced: dict[str, torch.Tensor] = {}
    wrapped: Any = None
    for name, folder, config, scale in zip(names, adapters, read_configs(adapters), scales, strict=True):
        try:
            module_patterns.check_file(config, modules, folder)
            wrapped, table = _table(wrapped or model, config, name)
        except ValueError as error:
            raise wrong_base(folder, base, first_line(error)) from None
        except (TypeError, AttributeError, NotImplementedError, re.error) as error:  # PEFT's own fields, unchecked
            raise invalid_config(folder / ADAPTER_CONFIG, f"{type(error).__name__}: {error}") from None
        tensors = {key: tensor.to(device).float() for key, tensor in read_adapter(folder).items()}
        state = wrapped.state_dict()
        loaded: dict[str, torch.Tensor] = {}
        earlier = {*replaced}
        for key in sorted(tensors.keys() | table.keys()):
            place = table.get(key, key)
            in_base = place.removeprefix(PREFIX).replace(".base_layer.", ".")
            if key not in tensors:
                missing = sorted(table.keys() - tensors.keys())
                raise wrong_base(folder, base, f"the adapter lacks {missing[0]}{more(missing)}")
            if in_base not in shapes and key not in table:
                extra = sorted(tensors.keys() - table.keys())
                raise wrong_base(folder, base, f"there is no place in it for {key}{more(extra)}")
            needed = shapes[in_base] if in_base in shapes else tuple(state[place].shape)
            if tensors[key].shape != needed:
                held, needs = _format_shape(tensors[key].shape), _format_shape(needed)
                raise wrong_base(folder, base, f"{key} is {held}, and this base needs {needs}")
            if in_base in earlier:
                raise ModelError(
                    f"two of the adapters hold {in_base} of the base itself",
                    where=str(folder),
                    help="merge one of them",
                )
            (replaced if in_base in shapes else loaded)[in_base if in_base in shapes else place] = tensors[key]
        wrapped.load_state_dict(loaded, strict=False, assign=True)
        fixed_values.restore_indices(wrapped, device)
        if scale != 1:
            _scale(wrapped, name, scale, folder)
    if len(names) > 1:
        try:
            wrapped.base_model.set_adapter(names, inference_mode=True)
        except ValueError as error:
            raise ModelError("these adapters cannot be merged together", why=first_line(error)) from None
    return wrapped.eval(), replaced


def _table(model: Any, config: PeftConfig, name: str) -> tuple[Any, dict[str, str]]:
    """Inject one adapter's layers; its tensors' names in the model by those in its file."""
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights: they are untied here where they must be
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        else:
            model = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
        # PEFT renames whatever stands for the tensors, here their own names.
        names = {key: key for key in model.state_dict()}
        return model, get_peft_model_state_dict(model, names, name, save_embedding_layers=False)


def _scale(model: PeftModel, name: str, scale: float, folder: Path) -> None:
    if (kind := model.peft_config[name].peft_type.value) != "LORA":
        raise ModelError(f"{folder} is {kind}, and only LoRA has a weight", help="remove --weights")
    if model.peft_config[name].trainable_token_indices:
        raise ModelError(f"{folder} has no weight: it replaces rows of the embeddings, which is not a sum")
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            if name in layer.lora_variant:
                raise ModelError(f"{folder} is DoRA, which has no weight: its change is not a sum")
            layer.set_scale(name, scale)


def _format_shape(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)


# ---- a base in 4 bits ----


def quantized_weights(model: Any) -> dict[str, bool]:
    """The weights that bitsandbytes quantizes, by Transformers' own rule, and whether it turns them first (Conv1D)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


class RoundTrip:
    """bitsandbytes' 4-bit quantization and its inverse, as in training (Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        quant_type: `nf4` or `fp4`.
        nested: whether the constants are quantized too.
        dtype: what the weights were loaded in before they were quantized, and computed in after.
    """

    def __init__(self, quant_type: str, nested: bool, dtype: torch.dtype):
        self.quant_type, self.nested, self.dtype = quant_type, nested, dtype

    def __call__(self, weight: torch.Tensor, turned: bool = False) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = (weight.T if turned else weight).to(self.dtype).contiguous()
        packed, state = quantize_4bit(weight, quant_type=self.quant_type, compress_statistics=self.nested)
        back = dequantize_4bit(packed, state)
        return back.T if turned else back
