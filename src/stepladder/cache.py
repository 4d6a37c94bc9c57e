"""Where Stepladder keeps what it can make again: under XDG_CACHE_HOME, else ~/.cache."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """The cache's root; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder"
