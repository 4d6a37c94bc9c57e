"""The part of a recipe that data/ and model/ use: the value of a key, and where it was set."""

from __future__ import annotations

from typing import Any, Protocol


class Settings(Protocol):
    """The protocol that a recipe fulfils; recipe/ itself imports data/, so that data/ cannot import it.

    `values` holds the keys that were set, `get` the default too.
    """

    values: dict[str, Any]

    def get(self, key: str) -> Any: ...

    def where(self, key: str) -> str: ...
