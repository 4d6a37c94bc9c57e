"""What a person reads when their input is wrong: what, why, the way out; never a traceback.

Exit codes of every script: 0 done, 1 failed, 2 the input is wrong, 75 preempted after a
complete checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED = 1, 2, 75


class StepladderError(Exception):
    """A mistake that the user can mend.

    Args:
        what: the fault, with the offending value.
        why: why it is one; may be empty where `what` says it all.
        way_out: what to type or change.
        where: `file:line:column`, or the file, or `command line`.
        this_rank_only: the fault concerns one rank, which then reports it itself. Other
            faults are found by all ranks alike, and rank 0 alone reports them.
    """

    kind = "error"

    def __init__(self, what: str, *, why: str = "", way_out: str = "", where: str = "", this_rank_only: bool = False):
        self.what, self.why, self.way_out, self.where = what, why, way_out, where
        self.this_rank_only = this_rank_only
        super().__init__(self.render())

    def __reduce__(self) -> tuple:  # from a worker process it arrives as it was raised
        made = functools.partial(type(self), self.what, why=self.why, way_out=self.way_out, where=self.where)
        return functools.partial(made, this_rank_only=self.this_rank_only), ()

    def render(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [f"✘ {self.kind}: {head}"]
        for label, text in (("why", self.why), ("way out", self.way_out)):
            if text:
                lines.append(f"  {label + ':':9}" + text.replace("\n", "\n" + " " * 11))
        return "\n".join(lines)


class RecipeError(StepladderError):
    """A key, value or combination in the recipe or on the command line."""

    kind = "recipe"


class RecipeErrors(RecipeError):
    """All faults of one recipe, reported at once."""

    def __init__(self, errors: list[RecipeError]):
        self.errors = errors
        super().__init__(f"{len(errors)} errors")

    def render(self) -> str:
        return "\n".join(error.render() for error in self.errors)


class DataError(StepladderError):
    """A data file, row or column."""

    kind = "data"


class ModelError(StepladderError):
    """A model, adapter or tokenizer folder."""

    kind = "model"


class RunError(StepladderError):
    """A folder that should hold a run, or a place to write what is made of it."""

    kind = "run"


class LaunchError(StepladderError):
    """Ranks, devices or the run folder do not fit what was asked for."""

    kind = "launch"


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a script's main and turn a user's mistake into one message and exit code 2."""
    try:
        sys.exit(main() or 0)
    except StepladderError as error:
        rank = os.environ.get("RANK", "0")
        _tell_launcher(error)
        if error.this_rank_only:
            print(f"[rank {rank}] {error.render()}", file=sys.stderr, flush=True)
        elif rank == "0":
            print(error.render(), file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `… | head`: the reader left, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_launcher(error: StepladderError) -> None:
    """Put the message where torchrun's closing report shows it.

    torchrun (and so `accelerate launch`) prints its own traceback over any rank that does not
    exit with 0; by this file, which is torch's documented way, its last lines say the reason.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        info = {"py_callstack": "\n" + error.render(), "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as out:
            json.dump({"message": {"message": error.what, "extraInfo": info}}, out)
