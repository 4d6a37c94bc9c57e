"""The global batch and how it lies over micro-batches and ranks: the same rows a step on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepladder.errors import RecipeError
from stepladder.settings import Settings


@dataclass(frozen=True)
class Layout:
    """One optimizer step: `rows` sequences in `accumulation` micro-batches of `micro` places on each of `ranks`.

    Where the micro-batches hold more places than there are rows, the rest is filled with empty
    rows, which train nothing.
    """

    rows: int
    micro: int
    ranks: int
    accumulation: int

    @property
    def batches(self) -> int:
        """Micro-batches of a step, over all ranks; the ranks take them in turn."""
        return self.accumulation * self.ranks

    @property
    def places(self) -> int:
        return self.batches * self.micro

    def spread(self, items: Sequence[int], empty: int) -> Iterator[int]:
        """At most `rows` items over the micro-batches, as evenly as they go, each filled up with `empty`."""
        for number in range(self.batches):
            first, end = (len(items) * edge // self.batches for edge in (number, number + 1))
            yield from items[first:end]
            yield from [empty] * (self.micro - (end - first))


def layout(global_batch_size: int, micro_batch_size: int, ranks: int, where: str = "") -> Layout:
    """The fewest micro-batches of at most `micro_batch_size` sequences that hold the global batch on `ranks` ranks.

    They are no larger than they need to be: 8 sequences on 4 ranks are 2 for each, whatever one rank could hold, so
    that a recipe that is right for one GPU is right for a node of them.

    Raises:
        RecipeError: a batch size below 1, or fewer sequences than ranks.
    """
    if min(global_batch_size, micro_batch_size) < 1:
        raise RecipeError("batch sizes are whole numbers from 1 up", where=where)
    if global_batch_size < ranks:
        raise RecipeError(
            f"global_batch_size {global_batch_size} is smaller than the {ranks} ranks",
            where=where,
            why="some of them would have nothing to train at any step",
            help=f"global_batch_size: {ranks}, or --num_processes {global_batch_size}",
        )
    accumulation = -(-global_batch_size // (micro_batch_size * ranks))
    micro = -(-global_batch_size // (accumulation * ranks))
    return Layout(global_batch_size, micro, ranks, accumulation)


def sums_sharded(settings: Settings) -> bool:
    """Whether FSDP reduces the gradients after every micro-batch, so that a rank keeps its shard of their sum.

    Else it sums whole gradients in fp32 until the step's last micro-batch (`set_requires_gradient_sync`). Those of an
    adapter are small, and reducing them once a step is faster; of a whole model no GPU could hold them.
    """
    asked = (settings.get("accelerator_config") or {}).get("gradient_accumulation_kwargs") or {}
    chosen = asked.get("sync_each_batch")
    return not settings.get("use_peft") if chosen is None else bool(chosen)
