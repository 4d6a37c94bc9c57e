"""The global batch: micro-batch × accumulation × ranks, the same on any number of ranks."""

from __future__ import annotations

from stepladder.errors import RecipeError


def accumulation_steps(global_batch_size: int, micro_batch_size: int, ranks: int, where: str = "") -> int:
    """How many micro-batches each rank runs before an optimizer step.

    Args:
        global_batch_size: sequences per optimizer step over all ranks.
        micro_batch_size: sequences per forward pass on one rank.
        ranks: data-parallel ranks.

    Raises:
        RecipeError: the micro-batches of all ranks do not add up to the global batch.
    """
    per_pass = micro_batch_size * ranks
    if min(global_batch_size, micro_batch_size) < 1:
        raise RecipeError("batch sizes are whole numbers from 1 up", where=where)
    steps, rest = divmod(global_batch_size, per_pass)
    if rest == 0:
        return steps
    nearest = sorted({max(steps, 1) * per_pass, (steps + 1) * per_pass})
    divisors = [m for m in range(1, global_batch_size + 1) if global_batch_size % (m * ranks) == 0]
    fitting = sorted(divisors, key=lambda m: abs(m - micro_batch_size))[:2]
    ways = [f"global_batch_size: {' or '.join(map(str, nearest))}"]
    if fitting:
        ways.append(f"or per_device_train_batch_size: {' or '.join(map(str, sorted(fitting)))}")
    raise RecipeError(
        f"global_batch_size {global_batch_size} is not a multiple of "
        f"per_device_train_batch_size {micro_batch_size} × {ranks} {'rank' if ranks == 1 else 'ranks'} = {per_pass}",
        where=where,
        why="every optimizer step takes whole micro-batches on every rank",
        way_out=", ".join(ways),
    )
