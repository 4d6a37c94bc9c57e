"""An adapter's configuration: checked before PEFT reads it, and what of it can become weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.console import quoted
from stepladder.errors import ModelError
from stepladder.files import read_object
from stepladder.model.merge.weights import Weights

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# These begin by changing the base's weights (PiSSA keeps what its factors leave over), so that
# PEFT must see the whole model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva", "mica")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


# What LoRA's fields may hold. PEFT checks none of them, and takes the text "false" for true.
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), _is_number),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), lambda value: isinstance(value, bool | None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _are_numbers),
    **dict.fromkeys(("target_modules", "exclude_modules"), lambda value: isinstance(value, str) or _are_names(value)),
    "modules_to_save": _are_names,
}


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        ModelError: it cannot be read, or a value is of another kind than its field.
    """
    file = folder / CONFIG
    try:
        config = read_object(file)
    except ValueError as error:
        raise ModelError(f"{file} cannot be read: {error}", help="copy or fetch the adapter again") from None
    fields = {"peft_type": lambda value: isinstance(value, str)}
    for key, is_right in (fields | FIELDS if config.get("peft_type") == "LORA" else fields).items():
        if key in config and not is_right(config[key]):
            raise invalid_config(file, f"{key} cannot be {json.dumps(config[key])[:80]}")
    return config


def configs(adapters: list[Path]) -> list[PeftConfig]:
    """The adapters' configurations.

    Raises:
        ModelError: no adapter, a pickled one, or a kind that cannot become weights.
    """
    from peft import PeftConfig

    found = []
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
        found.append(config)
    return found


def invalid_config(file: Path, what: str) -> ModelError:
    return ModelError(f"{file} cannot be used: {what}", help="copy or fetch the adapter again")
