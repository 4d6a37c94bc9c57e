"""What cannot run on native Windows, on macOS or on Apple's GPUs (MPS), refused before training.

Nothing of it was run on such a machine: what needs Linux, or was not tried elsewhere, is refused with what helps.
"""

from __future__ import annotations

import sys

from stepladder import hardware, installation
from stepladder.errors import LaunchError, RecipeError
from stepladder.recipe.recipe import Recipe
from stepladder.training.launch.launcher import Launch

SYSTEM = sys.platform  # the tests set another one
WSL = "WSL 2, which is Linux (`wsl --install`)"
# Keys that start processes, and the largest value that starts none.
PROCESS_COUNTS = {"dataset_num_proc": 1, "dataloader_num_workers": 0}
# Keys that MPS has no kernels for, or that were not tried on it.
NOT_ON_MPS = {
    "load_in_4bit": "bitsandbytes has no compiled kernels for it before macOS 26",
    "load_in_8bit": "bitsandbytes has no compiled kernels for it before macOS 26",
    "fp16": "training in fp16 was not tried on it",
    "fp8": "it has no fp8 products",
    "torch_compile": "PyTorch calls its compiler for it a prototype",
    "use_liger_kernel": "Liger's kernels are Triton's, which it does not run",
    "activation_offloading": "TRL asks the device for CUDA's streams",
}
# Values of `optim` that are computed by PyTorch's own operations (transformers/trainer_optimizer.py).
ON_MPS = ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd")


def check_system(recipe: Recipe, launch: Launch) -> None:
    """Refuse what this operating system cannot run.

    Raises:
        LaunchError: several ranks on native Windows, or DeepSpeed outside Linux.
        RecipeError: a key asks for more processes on native Windows.
    """
    if SYSTEM == "win32" and (launch.ranks > 1 or launch.strategy.shards):
        raise LaunchError(
            f"{launch.ranks} ranks under {launch.strategy} on native Windows",
            why="PyTorch has no NCCL there, signals do not reach the ranks, and no strategy was tried",
            help=f"{WSL}; or one process: {installation.command('sft')} …",
        )
    if SYSTEM != "linux" and launch.strategy.is_zero:
        raise LaunchError(
            f"{launch.strategy} needs Linux",
            why="DeepSpeed's collectives for CPUs use Linux' shared memory, and its GPUs are CUDA's",
            help=f"one process: {installation.command('sft')} …; or accelerate_configs/ddp.yaml on the CPU",
        )
    for key, most in PROCESS_COUNTS.items():
        if SYSTEM == "win32" and (recipe.get(key) or 0) > most:
            raise RecipeError(
                f"{key}: {recipe.get(key)} on native Windows",
                where=recipe.where(key),
                why="the rows lie in an open file, which Windows does not pass to another process",
                help=f"{key}: {most}; or {WSL}",
            )


def check_device(recipe: Recipe) -> None:
    """Raise RecipeError for a key that this machine's GPU cannot compute, where it is Apple's."""
    if hardware.accelerator() == "mps":
        check_mps(recipe)


def check_mps(recipe: Recipe) -> None:
    """Raise RecipeError for a key that Apple's GPUs cannot compute, where one is used."""
    import torch

    for key, why in NOT_ON_MPS.items():
        if recipe.get(key):
            help = f"{key}: false; or use_cpu: true"
            raise RecipeError(f"{key}: true on Apple's GPU (MPS)", where=recipe.where(key), why=why, help=help)
    if (name := recipe.get("optim")) not in (None, *ON_MPS):
        why = "kernels of other packages are CUDA's; PyTorch's own optimizers run on it"
        raise RecipeError(f"optim: {name} on Apple's GPU (MPS)", where=recipe.where("optim"), why=why,
                          help=f"optim: {', '.join(ON_MPS)}; or use_cpu: true")  # fmt: skip
    _check_dtype(recipe, has_bf16=torch.backends.mps.is_macos_or_newer(14, 0))
    attention = str(recipe.get("attn_implementation"))
    if attention not in ("auto", "sdpa", "eager", "None"):
        why = "it has kernels for CUDA only"
        raise RecipeError(f"attn_implementation: {attention} on Apple's GPU (MPS)", why=why, help="auto, sdpa or eager",
                          where=recipe.where("attn_implementation"))  # fmt: skip


def _check_dtype(recipe: Recipe, has_bf16: bool) -> None:
    """Raise RecipeError for a dtype that MPS has not; PyTorch's autocast would compute in fp32, with a warning."""
    old = "PyTorch computes in bf16 on it from macOS 14 on, and this one is older"
    refused = {"dtype: float16": "training in fp16 was not tried on it"}
    if not has_bf16:
        refused |= {"bf16: True": old, "dtype: bfloat16": old, "dtype: auto": f"the file may hold bf16; {old}"}
    for value, why in refused.items():
        key = value.partition(":")[0]
        if f"{key}: {recipe.get(key)}" == value:
            help = f"{key}: {'false' if key == 'bf16' else 'float32'}; or use_cpu: true"
            raise RecipeError(f"{value.lower()} on Apple's GPU (MPS)", where=recipe.where(key), why=why, help=help)
