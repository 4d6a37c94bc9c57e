"""An adapter's configuration: checked before PEFT reads it, and what of it can become weights."""

from __future__ import annotations

import json
import math
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
            raise invalid_config(file, f"{key} cannot be {json.dumps(config[key])[:80]}")


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
            raise invalid_config(folder / CONFIG, f"{type(error).__name__}: {error}") from None
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


def invalid_config(file: Path, what: str) -> ModelError:
    return ModelError(f"{file} cannot be used: {what}", way_out="copy or fetch the adapter again")
