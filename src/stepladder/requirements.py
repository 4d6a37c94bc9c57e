"""What a run needs beside its recipe: library versions, accounts, a compiler, disk space. Checked before it starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stepladder import installation
from stepladder.errors import LaunchError
from stepladder.settings import Settings

TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "swanlab")  # named as their packages are
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate")
# What optimizers are imported from, and what is installed for it, by the beginning of their names
# (transformers/trainer_optimizer.py; tests/test_rules.py holds it to that).
OPTIMIZERS = {
    "adalomo": ("lomo_optim", "lomo-optim"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_npu": ("torch_npu", "torch-npu"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "galore": ("galore_torch", "galore-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}


def versions(settings: Settings) -> str:
    """The versions of the libraries that compute, and which are newer than the tested ones.

    Raises:
        LaunchError: one is missing or older than what the code uses, or what a key of the recipe takes is.
    """
    for needed in list_declared():
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            raise LaunchError(
                f"{needed.name} is not installed",
                help=installation.install_command(str(needed).partition(";")[0].strip()),
            ) from None
        lowest = SpecifierSet(",".join(str(bound) for bound in needed.specifier if not bound.operator.startswith("<")))
        if not lowest.contains(found, prereleases=True):
            raise LaunchError(
                f"{needed.name} {lowest} is needed, and {found} is here",
                help=installation.install_command(str(needed).partition(";")[0].strip()),
            )
    for key, value, module, package, instead in _packages(settings):
        if not importlib.util.find_spec(module):
            raise LaunchError(
                f"{key}: {value} takes {package}, which is not installed",
                where=settings.where(key),
                help=f"pip install {package}, or {key}: {instead}",
            )
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    return "; ".join([found, *untested_versions()])


def untested_versions() -> list[str]:
    """One note per library that is newer than the tested versions."""
    notes = []
    for needed in list_declared():
        found = importlib.metadata.version(needed.name)
        if not needed.specifier.contains(found, prereleases=True):
            notes.append(f"{needed.name} {found} is untested: Stepladder was tested with {needed.specifier}")
    return notes


def list_declared(extra: str = "") -> list[Requirement]:
    """What pyproject.toml declares for an extra; without one, for all."""
    try:
        found = importlib.metadata.requires("stepladder") or []
    except importlib.metadata.PackageNotFoundError:  # run from its folder, without make install
        found = [*SHOWN, "datasets"]
    return [one for one in map(Requirement, found) if not one.marker or one.marker.evaluate({"extra": extra})]


def accounts(settings: Settings) -> str:
    """Which accounts the run uses. Without a key, W&B is offline, and says how to upload the run.

    Raises:
        LaunchError: the result is to be pushed to the hub, and there is no token.
    """
    said = []
    if "wandb" in _trackers(settings):
        server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
        key = bool(os.environ.get("WANDB_API_KEY"))
        with contextlib.suppress(OSError):
            netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser()
            key = key or server in netrc.read_text(encoding="utf-8", errors="replace").split()
        said.append("W&B with its key" if key else "W&B offline, since there is no key (wandb login)")
    if settings.get("push_to_hub"):
        from huggingface_hub import get_token

        if not get_token():
            raise LaunchError(
                "push_to_hub: true, and there is no token of the hub",
                where=settings.where("push_to_hub"),
                help="hf auth login, or HF_TOKEN, or push_to_hub: false",
            )
        said.append("the hub with its token")
    return ", ".join(said) or "none needed"


def _packages(settings: Settings) -> Iterator[tuple[str, str, str, str, str]]:
    """Key, value, module, package and alternative value of each value that needs an optional package."""
    for name in _trackers(settings):
        if name in TRACKERS:
            yield "report_to", name, name, name, "none"
    if settings.get("use_liger_kernel"):
        yield "use_liger_kernel", "true", "liger_kernel", "liger-kernel", "false"
    if settings.get("fp8"):
        yield "fp8", "true", "torchao", "torchao", "false"
    optimizer = settings.get("optim")
    for begins, (module, package) in OPTIMIZERS.items():
        if optimizer.startswith(begins):
            yield "optim", optimizer, module, package, "adamw_torch_fused"


def _trackers(settings: Settings) -> list[str]:
    report_to = settings.get("report_to")
    return [report_to] if isinstance(report_to, str) else report_to or []


def compiler(settings: Settings) -> str:
    """What `torch_compile` builds its kernels with; a PyTorch without it says so at the first step only.

    Raises:
        LaunchError: there is no C++ compiler, or Python's headers are not installed.
    """
    if not settings.get("torch_compile") or settings.get("torch_compile_backend") not in (None, "inductor"):
        return "none needed"
    name = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not shutil.which(name) or not headers.is_file():
        missing = f"{headers} is" if shutil.which(name) else f"a C++ compiler ({name}) is"
        raise LaunchError(
            f"torch_compile: true builds kernels, and {missing} not installed",
            where=settings.where("torch_compile"),
            help="sudo apt install g++ python3-dev, CXX=/path/to/one, or torch_compile: false",
        )
    return f"{shutil.which(name)}, for torch_compile"


def disk(settings: Settings, folder: Path, trained: float, states: float, whole: float, replaced_bytes: int = 0) -> str:
    """The disk space that checkpoints and the result take, and the free space.

    Args:
        trained: bytes of the trained weights, which every checkpoint holds.
        states: bytes of the optimizer's state, which it holds too.
        whole: bytes of the result: the model, or the adapter.
        replaced_bytes: of the run that gives way to this one.

    Raises:
        LaunchError: the folder cannot be written, or they do not fit.
    """
    kept = settings.get("save_total_limit") or math.inf
    if settings.get("save_strategy") == "no":
        count = 0.0
    elif kept < math.inf:
        count = kept + 1  # an old one goes only when the new one is whole
    else:
        count = 2  # how many there will be is not known here: the first two, then
    need = count * (trained + (0 if settings.get("save_only_model") else states)) + whole
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = f"{parent} is a file" if not parent.is_dir() else f"{parent} cannot be written by this user"
        raise LaunchError(f"output_dir {folder} cannot be written", where=settings.where("output_dir"), why=why,
                          help="another output_dir")  # fmt: skip
    free = shutil.disk_usage(parent).free + replaced_bytes
    checkpoints = f"{count:.0f} checkpoints and the result take" if count else "the result takes"
    if need > free:
        raise LaunchError(
            f"{checkpoints} {_gib(need)}, and {parent} has {_gib(free)} free",
            where=settings.where("output_dir"),
            help="another output_dir, save_total_limit: 1, or save_only_model: true (which cannot be resumed)",
        )
    return f"{checkpoints} {_gib(need)} of {_gib(free)} free in {parent}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
