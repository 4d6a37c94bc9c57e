"""Which tokens have a loss, by the keys of the recipe."""

from __future__ import annotations

from stepladder.settings import Settings


def mode(settings: Settings | None) -> str:
    """`train_on`; TRL's `assistant_only_loss: false` or `completion_only_loss: false`, where set, mean everything."""
    if settings is None:
        return "all_turns"
    if any(settings.values.get(key) is False for key in ("assistant_only_loss", "completion_only_loss")):
        return "everything"
    return str(settings.get("train_on"))


def reasoning_mode(settings: Settings | None) -> str:
    """`train_on_reasoning`."""
    return str(settings.get("train_on_reasoning")) if settings else "all"


def idle_notes(settings: Settings, masked: int) -> list[str]:
    """A note where `train_on_reasoning` has taken the loss from no token (`masked`)."""
    value = reasoning_mode(settings)
    if value == "all" or masked:
        return []
    which = "an earlier turn" if value == "last" else "a turn"
    return [f"train_on_reasoning: {value} changes nothing: no thought of {which} would have a loss without it"]
