"""Stepladder: fine-tuning that scales without surprises."""

import os

__version__ = "0.1.0"

# A stage (scripts/stage.py) takes the place of the hub. Here, since huggingface_hub reads both as it is imported.
if _stage := os.environ.get("STEPLADDER_STAGE"):
    os.environ |= {"HF_HUB_CACHE": os.path.join(_stage, "hub"), "HF_HUB_OFFLINE": "1"}
