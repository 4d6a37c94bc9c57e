"""The part of a recipe that data/ and model/ use: the value of a key, and where it was set."""

from __future__ import annotations

from typing import Any, Protocol

VIRTUAL = {"prefix": "prefix tuning", "prompt": "prompt tuning"}  # by the recipe's peft_type
# Methods whose fields of PEFT's configuration all stand in `peft_kwargs`, by the recipe's peft_type.
TUNERS = {"ia3": "IA³", "vera": "VeRA", "oft": "OFT"}
DECOMPOSED = ("pissa", "olora")  # initializations of LoRA that begin as a part of the base's weights


class Settings(Protocol):
    """The protocol that a recipe fulfils; recipe/ itself imports data/, so that data/ cannot import it.

    `values` holds the keys that were set, `get` the default too.
    """

    values: dict[str, Any]

    def get(self, key: str) -> Any: ...

    def where(self, key: str) -> str: ...

    def with_values(self, **values: Any) -> Settings: ...


def has_virtual_tokens(settings: Settings) -> bool:
    """Whether the recipe trains tokens before each prompt in place of weights."""
    return bool(settings.get("use_peft")) and settings.get("peft_type") in VIRTUAL
