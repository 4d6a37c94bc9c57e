"""A script's command line: its parser, and numbers that are refused out of their range before anything is loaded."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import threading
from pathlib import Path

from stepladder import installation

FP32_MAX = 3.4028234663852886e38  # the largest number of fp32, which weights and optimizers compute in
TRUST = "run the Python code that comes with a model: it can do all that you can"


def parser(description: str | None, script: str) -> argparse.ArgumentParser:
    """A script's parser, whose help spells commands as the current folder needs them.

    Args:
        description: the script's docstring.
        script: its `__file__`.
    """
    return argparse.ArgumentParser(
        prog=installation.command(Path(script).stem),
        description=installation.localize(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def count(text: str, least: int = 1) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    if number > sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text} is more than a computer counts")
    return number


def integer(text: str) -> int:
    """A whole number from 0 on."""
    return count(text, least=0)


def seed(text: str) -> int:
    """A seed that NumPy takes."""
    if (number := integer(text)) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is more than {2**32 - 1}")
    return number


def path(text: str) -> Path:
    """A file or folder by name: `--output_dir "$UNSET"` would be the folder that the command was typed in.

    `--output_dir=~/x` reaches a script as it is: shells expand `~` at the beginning of a word only.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(os.path.expanduser(text))


def gpus(text: str) -> str:
    """GPUs of a node as Slurm has them: how many, or a type and how many."""
    if not re.fullmatch(r"([^:\s]+:)?[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is neither N nor TYPE:N")
    return text


def add_gpu_memory(parser: argparse.ArgumentParser) -> None:
    """`--gpu_memory`, as `hardware.device` takes it."""
    parser.add_argument(
        "--gpu_memory", "--gpu-memory", type=above_0, metavar="GiB", help="memory of a GPU that is not listed"
    )


def memory(text: str) -> str:
    """A size as Slurm has it: MiB, or with a letter for the unit; 0 is all of a node."""
    if not re.fullmatch(r"[0-9]+[KMGTkmgt]?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 48G")
    return text


def finite(text: str) -> float:
    """Any number that fp32 has, so not NaN or infinity."""
    if not math.isfinite(found := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    if abs(found) > FP32_MAX:
        raise argparse.ArgumentTypeError(f"{text} is beyond {FP32_MAX:.2g}, the largest number of fp32")
    return found


def above_0(text: str) -> float:
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def seconds(text: str) -> float:
    """A time to wait, as long as a clock can count."""
    if (number := above_0(text)) > threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is more than {threading.TIMEOUT_MAX:.0f}")
    return number


def temperature(text: str) -> float:
    """0 for the likeliest token, or a number that logits can be divided by in fp32."""
    if 0 < (number := 0.0 if finite(text) == 0 else above_0(text)) < 1e-6:
        raise argparse.ArgumentTypeError(f"{text} is below 1e-6; 0 takes the likeliest token")
    return number


def fraction(text: str) -> float:
    """More than 0, and 1 at most."""
    if (number := above_0(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1")
    return number


def size(text: str) -> int:
    """Bytes, from a number with a decimal unit: 5GB, 500MB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no size: 5GB, or 500MB")
    return count(str(count(number) * units[unit]))
