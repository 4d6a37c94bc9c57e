"""PEFT's layers, with an adapter's tensors in them, put into a model without weights."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.console import quoted
from stepladder.errors import ModelError
from stepladder.model.adapter import read_tensors, wrong_base
from stepladder.model.merge.weights import Weights, more
from stepladder.model.start import ADAPTER, CONFIG, invalid_config, read_config

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # PEFT's, before each name of the base model


def read_configs(adapters: list[Path]) -> list[PeftConfig]:
    """The adapters' configurations.

    Raises:
        ModelError: no adapter, a pickled one, or a kind that cannot become weights.
    """
    from peft import PeftConfig

    configs = []
    for folder in adapters:
        if not (folder / CONFIG).is_file():
            raise ModelError(f"{folder} is no adapter: it has no adapter_config.json", help="check the path")
        read_config(folder)
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:  # KeyError: a peft_type that it does not know
            raise invalid_config(folder / CONFIG, f"{type(error).__name__}: {error}") from None
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ModelError(
                f"{folder} is {config.peft_type.value}, which cannot be merged",
                why="it learned tokens that come before the prompt, not a change of the base's weights",
                help="serve base and adapter together: "
                f'python scripts/generate.py --model {quoted(folder)} --prompt "…"',
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"{folder} is an activated LoRA, which cannot be merged",
                why="it applies to the tokens after its invocation only",
                help="serve base and adapter together",
            )
        Weights(folder, single=ADAPTER)
        configs.append(config)
    return configs


def vocabulary(model: PreTrainedModel, adapters: list[Path], tokens: int) -> int:
    """Rows of the embeddings: the base's, unless an adapter was trained on more (or fewer), or has more tokens."""
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    names = [name for name, module in model.named_modules() if module in ends]
    for folder in adapters:
        tensors = Weights(folder, single=ADAPTER).tensors
        for name in names:
            for suffix in (".weight", ".base_layer.weight"):
                if found := tensors.get(f"{PREFIX}{name}{suffix}"):
                    return found.shape[0]
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
    given: dict[str, torch.Tensor] = {}
    wrapped: Any = None
    for name, folder, config, scale in zip(names, adapters, read_configs(adapters), scales, strict=True):
        try:
            wrapped, table = _table(wrapped or model, config, name)
        except ValueError as error:
            raise wrong_base(folder, base, str(error).splitlines()[0]) from None
        except (TypeError, AttributeError, NotImplementedError, re.error) as error:  # PEFT's own fields, unchecked
            raise invalid_config(folder / CONFIG, f"{type(error).__name__}: {error}") from None
        tensors = {key: tensor.to(device).float() for key, tensor in read_tensors(folder).items()}
        state = wrapped.state_dict()
        loaded: dict[str, torch.Tensor] = {}
        for key in sorted(tensors.keys() | table.keys()):
            own = table.get(key, key)
            in_base = own.removeprefix(PREFIX).replace(".base_layer.", ".")
            if key not in tensors:
                missing = sorted(table.keys() - tensors.keys())
                raise wrong_base(folder, base, f"the adapter lacks {missing[0]}{more(missing)}")
            if in_base not in shapes and key not in table:
                extra = sorted(tensors.keys() - table.keys())
                raise wrong_base(folder, base, f"there is no place in it for {key}{more(extra)}")
            needed = shapes[in_base] if in_base in shapes else tuple(state[own].shape)
            if tensors[key].shape != needed:
                raise wrong_base(folder, base, f"{key} is {_by(tensors[key].shape)}, and this base needs {_by(needed)}")
            (given if in_base in shapes else loaded)[in_base if in_base in shapes else own] = tensors[key]
        wrapped.load_state_dict(loaded, strict=False, assign=True)
        if scale != 1:
            _scale(wrapped, name, scale, folder)
    if len(names) > 1:
        try:
            wrapped.base_model.set_adapter(names, inference_mode=True)
        except ValueError as error:
            raise ModelError("these adapters cannot be merged together", why=str(error).splitlines()[0]) from None
    return wrapped.eval(), given


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
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            if name in layer.lora_variant:
                raise ModelError(f"{folder} is DoRA, which has no weight: its change is not a sum")
            layer.set_scale(name, scale)


def _by(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)
