"""What the rooms below need to know of a recipe: each key's value, and where it was set."""

from __future__ import annotations

from typing import Any, Protocol


class Settings(Protocol):
    """A recipe is one; data/ and model/ take it without knowing how recipes are read.

    `values` holds the keys that were set, `get` the default too.
    """

    values: dict[str, Any]

    def get(self, key: str) -> Any: ...

    def where(self, key: str) -> str: ...
