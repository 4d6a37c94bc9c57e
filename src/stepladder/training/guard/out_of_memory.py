"""What a run that has no memory left says: how much it held, and the cheapest ways to need less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from stepladder.errors import TrainingError
from stepladder.settings import Settings
from stepladder.training.launch.launcher import Launch
from stepladder.training.watch.telemetry import peak_memory_bytes


@contextlib.contextmanager
def explained(recipe: Settings, launch: Launch, micro: int, planned: int | None = None) -> Iterator[None]:
    """Turn a failed allocation, on GPU or CPU, into one message.

    Args:
        planned: the peak that the plan foretold, in bytes.

    Raises:
        TrainingError: of this rank, with its peak and the ways down.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cpu = "can't allocate memory" in str(error)  # torch has no class of its own for it
        if not (cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        said = f"; the plan said that it needs {planned / 2**30:.2f}" if planned else ""
        raise TrainingError(
            f"out of memory on rank {launch.rank}, which held {peak_memory_bytes() / 2**30:.2f} GiB at most{said}",
            why=str(error).splitlines()[0] if str(error) else "",
            help="\n".join(ways_down(recipe, launch, micro)),
            this_rank_only=True,
        ) from None


def ways_down(recipe: Settings, launch: Launch, micro: int) -> list[str]:
    """What costs least first; the curve stays the same with each of them."""
    ways = []
    if micro > 1:
        half = f"--per_device_train_batch_size {micro // 2}"
        if recipe.get("global_batch_size"):
            ways.append(f"{half} (the accumulation follows: the global batch stays {recipe.get('global_batch_size')})")
        else:
            ways.append(f"{half} --gradient_accumulation_steps {2 * recipe.get('gradient_accumulation_steps')}")
    if not recipe.get("gradient_checkpointing"):
        ways.append("--gradient_checkpointing true (about a quarter slower)")
    if not launch.strategy.shards_weights:
        more = "" if launch.ranks > 1 else " on several devices"
        ways.append(f"accelerate launch --config_file accelerate_configs/zero3.yaml …{more}: weights are sharded too")
    elif not launch.strategy.offloads:
        ways.append(f"accelerate_configs/{launch.strategy}_offload.yaml: the shards lie in host memory")
    return ways[:3] or ["a smaller model, a shorter max_length, or more devices"]
