"""PEFT's layers, with an adapter's tensors in them, put into a model without weights."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.console import quoted
from stepladder.errors import ModelError
from stepladder.files import read_object
from stepladder.model.weights import Weights, more

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's, before each name of the base model
# These begin by changing the base's weights (PiSSA keeps what its factors leave over), so that
# PEFT must see the whole model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva", "mica")


# What LoRA's fields hold, where they hold anything. PEFT checks none of them, and takes the text "false" for true.
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out")
NUMBERS = ("r", "lora_alpha", "lora_dropout")
PATTERNS = ("rank_pattern", "alpha_pattern")
NAMES = ("target_modules", "exclude_modules", "modules_to_save")


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for a value of adapter_config.json that is of another kind than its field."""
    kind = config.get("peft_type")
    fields = ("peft_type", *SWITCHES, *NUMBERS, *PATTERNS, *NAMES) if kind == "LORA" else ("peft_type",)
    for key in fields:
        if key in config and not _is_right(key, config[key]):
            raise _no_config(file, f"{key} cannot be {json.dumps(config[key])[:80]}")


def _is_right(key: str, value: Any) -> bool:
    if key == "peft_type":
        return isinstance(value, str)
    if key in NUMBERS:
        return _is_number(value)
    if value is None:
        return True
    if key in SWITCHES:
        return isinstance(value, bool)
    if key in PATTERNS:
        return isinstance(value, dict) and all(map(_is_number, value.values()))
    is_pattern = isinstance(value, str) and key != "modules_to_save"
    return is_pattern or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def configs(adapters: list[Path]) -> list[PeftConfig]:
    """The adapters' configurations.

    Raises:
        ModelError: no adapter, a pickled one, or a kind that cannot become weights.
    """
    from peft import PeftConfig

    found = []
    for folder in adapters:
        if not (folder / CONFIG).is_file():
            raise ModelError(f"{folder} is no adapter: it has no adapter_config.json", way_out="check the path")
        check_config(folder / CONFIG, read_object(folder / CONFIG))
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:  # KeyError: a peft_type that it does not know
            raise _no_config(folder / CONFIG, f"{type(error).__name__}: {error}") from None
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ModelError(
                f"{folder} is {config.peft_type.value}, which cannot be merged",
                why="it learned tokens that come before the prompt, not a change of the base's weights",
                way_out="serve base and adapter together: "
                f'python scripts/generate.py --model {quoted(folder)} --prompt "…"',
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
    for name, folder, config, scale in zip(names, adapters, configs(adapters), scales, strict=True):
        try:
            wrapped, table = _table(wrapped or model, config, name)
        except ValueError as error:
            raise _mismatch(folder, base, str(error).splitlines()[0]) from None
        except (TypeError, AttributeError, NotImplementedError, re.error) as error:  # PEFT's own fields, unchecked
            raise _no_config(folder / CONFIG, f"{type(error).__name__}: {error}") from None
        tensors = _read(folder, device)
        state = wrapped.state_dict()
        loaded: dict[str, torch.Tensor] = {}
        for key in sorted(tensors.keys() | table.keys()):
            own = table.get(key, key)
            in_base = own.removeprefix(PREFIX).replace(".base_layer.", ".")
            if key not in tensors:
                missing = sorted(table.keys() - tensors.keys())
                raise _mismatch(folder, base, f"the adapter lacks {missing[0]}{more(missing)}")
            if in_base not in shapes and key not in table:
                extra = sorted(tensors.keys() - table.keys())
                raise _mismatch(folder, base, f"there is no place in it for {key}{more(extra)}")
            needed = shapes[in_base] if in_base in shapes else tuple(state[own].shape)
            if tensors[key].shape != needed:
                raise _mismatch(folder, base, f"{key} is {_by(tensors[key].shape)}, and this base needs {_by(needed)}")
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


def loaded(model: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """An adapter on a whole model, as PEFT loads it.

    Raises:
        ModelError: a tensor is missing, which PEFT would leave as random as it begins, with a warning.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, folder, name)
        except UserWarning as warning:
            missing = re.findall(r"'([^']+)'", str(warning)) or [str(warning)]
            what = f"the adapter lacks {missing[0].replace(f'.{name}.', '.')}{more(missing)}"
            raise _mismatch(folder, Path(model.name_or_path), what) from None


def _read(folder: Path, device: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = {key: tensor.to(device).float() for key, tensor in load_file(folder / ADAPTER).items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{key} holds numbers that are not finite", where=str(folder), way_out="train it again")
    return tensors


def _scale(model: PeftModel, name: str, scale: float, folder: Path) -> None:
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            if name in layer.lora_variant:
                raise ModelError(f"{folder} is DoRA, which has no weight: its change is not a sum")
            layer.set_scale(name, scale)


def _no_config(file: Path, what: str) -> ModelError:
    return ModelError(f"{file} cannot be used: {what}", way_out="copy or fetch the adapter again")


def _mismatch(adapter: Path, base: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit this base: {what}",
        where=str(adapter),
        why=f"it was trained on another model than {base}, or on another size of it",
        way_out="name the base that it was trained on: --base",
    )


def _by(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)
