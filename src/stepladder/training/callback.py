"""A callback of the user's own, from a file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stepladder.errors import LaunchError


def of(given: str | None) -> list[Any]:
    """An instance of the file's class `Callback`, or nothing where no file is given.

    It comes before the trainer's others: what it adds to `logs` reaches metrics.jsonl and the trackers.

    Raises:
        LaunchError: the file holds no class `Callback` that is one of Transformers'.
    """
    if given is None:
        return []
    file = Path(given)
    help = "docs/prometheus.py is one"
    if not os.path.isfile(file):  # which a name that is too long does not raise at
        raise LaunchError(f"--callback {file}: there is no such file", help=help)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise LaunchError(f"--callback {file} is no Python file", help=help)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(found := getattr(module, "Callback", None), type) or not issubclass(found, TrainerCallback):
        raise LaunchError(f"--callback {file} holds no class Callback(TrainerCallback)", help=help)
    return [found()]
