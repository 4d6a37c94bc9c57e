"""What a person reads of a fault: errors and verdicts, with what, why and what helps; never a traceback.

Exit codes of every script: 0 done, 1 failed, 2 the input is wrong, 3 what `compare.py --require` asks for
does not hold, 75 preempted after a complete checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stepladder import console

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNMET, EXIT_PREEMPTED = 1, 2, 3, 75
GOOD, LOOK, FAULT = "good", "look", "fault"  # severities of a verdict
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"  # what a paired test says
LEVEL = 0.05  # the chance of calling a difference real that is none


class StepladderError(Exception):
    """A mistake that the user can mend.

    Args:
        what: the fault, with the offending value.
        why: why it is one; may be empty where `what` says it all.
        help: what to type or change.
        where: `file:line:column`, or the file, or `command line`.
        this_rank_only: the fault concerns one rank, which then reports it itself. Other
            faults are found by all ranks alike, and rank 0 alone reports them.
    """

    kind = "error"
    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, *, why: str = "", help: str = "", where: str = "", this_rank_only: bool = False):
        self.what, self.why, self.help, self.where = what, why, help, where
        self.this_rank_only = this_rank_only
        super().__init__(self.render())

    def __reduce__(self) -> tuple:  # from a worker process it arrives as it was raised
        made = functools.partial(type(self), self.what, why=self.why, help=self.help, where=self.where)
        return functools.partial(made, this_rank_only=self.this_rank_only), ()

    def render(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [f"✘ {self.kind}: {head}"]
        for label, text in (("why", self.why), ("help", self.help)):
            if text:
                lines.append(f"  {label + ':':6}" + text.replace("\n", "\n" + " " * 8))
        return console.printable("\n".join(lines))


@contextlib.contextmanager
def locate_errors(where: str) -> Iterator[None]:
    """Set `where` of an error that is raised inside and has none."""
    try:
        yield
    except StepladderError as error:
        error.where = error.where or where
        error.args = (error.render(),)
        raise


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


class TrainingError(StepladderError):
    """What ends a run after a correct start: a NaN loss, out of memory, a hang."""

    kind = "training"
    exit_code = EXIT_FAILED


class CheckpointError(StepladderError):
    """A checkpoint that is damaged, or of another run."""

    kind = "checkpoint"


@dataclass(frozen=True)
class Verdict:
    """A judgement on a run's curves, or on what a model's answers show.

    `severity` is good, look or fault; `evidence` says the `figures` (losses in nats per token) in words.
    """

    severity: str
    name: str
    what: str
    evidence: str
    help: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def first_line(error: BaseException) -> str:
    """The first line of a library's error; the name of its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_with(main: Callable[[], int | None], prints_log: bool = False) -> None:
    """Run a script's main and turn a user's mistake into one message and exit code 2.

    Args:
        main: the script; it returns its exit code, None for 0.
        prints_log: what it prints is a log, and its result lies in files. Else a stdout that could not be
            written (a full disk) is a failure, and the exit code is 1.

    What fails on one rank alone is said by that rank, and to the launcher. The others, which lose
    their connection to it, say no more than that, and later, so that the cause is named first.
    """
    rank = os.environ.get("RANK", "0")
    console.keep_printing()
    try:
        code = main() or 0
        if code == EXIT_PREEMPTED:
            tell_launcher("preempted", "no failure: it stopped as asked, after a checkpoint. Start it again to go on.")
        if code == EXIT_UNMET:
            tell_launcher("not met", "no failure: what --require asks for does not hold.")
        end_process_groups()
        if code == 0 and not prints_log and (lost := console.lost_output()):
            print(f"✘ error: the output could not be written: {lost}", file=sys.stderr)
            code = EXIT_FAILED
        sys.exit(code)
    except StepladderError as error:
        _report(error, rank)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if no_path := _path_error(error):
            _report(no_path, rank)
            sys.exit(no_path.exit_code)
        full = _disk_error(error)
        if full:
            _report(full, rank)
        if "RANK" not in os.environ:
            if full:
                sys.exit(EXIT_FAILED)
            raise
        if lost_a_rank(error):
            time.sleep(2)  # the launcher orders by whole seconds
            print(f"[rank {rank}] ended: it lost its connection to another rank", file=sys.stderr, flush=True)
        elif not full:
            text = console.printable(f"[rank {rank}] {traceback.format_exc()}")
            print(text, file=sys.stderr, flush=True)
            tell_launcher(str(error), text)
        # not sys.exit: the process group's end would wait for a rank that is gone
        os._exit(EXIT_FAILED)
    finally:
        # Else the interpreter looks for garbage among all that is about to end: 1.3 s. A rank lets it: what
        # holds a process group (DDP) may go by that search only, and the group's threads would outlive what they use.
        if "RANK" not in os.environ:
            gc.freeze()


def _report(error: StepladderError, rank: str) -> None:
    tell_launcher(error.what, error.render())
    if error.this_rank_only:
        print(f"[rank {rank}] {error.render()}", file=sys.stderr, flush=True)
    elif rank == "0":
        print(error.render(), file=sys.stderr, flush=True)


def _path_error(error: Exception) -> StepladderError | None:
    """The message for a path that no file can have; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        return StepladderError(f"{name[:60]}{'…' * (len(name) > 60)} cannot be used: {error.strerror}")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return StepladderError("a path holds a NUL character, which no file's name can have")
    return None


def _disk_error(error: Exception) -> StepladderError | None:
    """The message for a disk that is full or read-only, also by the text of a Rust library; None for others."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    number = next((n for n in numbers if getattr(error, "errno", None) == n or f"(os error {n})" in str(error)), None)
    if number is None:
        return None
    file = getattr(error, "filename", None)
    what = f"{os.fsdecode(file)} cannot be written" if isinstance(file, (str, bytes)) else "the files cannot be written"
    help = "make room (df -h, quota), or another place"
    return StepladderError(what, why=os.strerror(number), help=help, this_rank_only="RANK" in os.environ)


def end_process_groups() -> None:
    """Destroy PyTorch's process groups at the end: NCCL warns of a leak otherwise."""
    groups = sys.modules.get("torch.distributed")
    if groups and groups.is_available() and groups.is_initialized():
        groups.destroy_process_group()


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error says only that another rank has ended (messages of gloo and NCCL)."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
             "NCCL communicator was aborted", "Connection refused", "recvBytes")  # fmt: skip
    return any(word in str(error) for word in words)


def tell_launcher(what: str, text: str) -> None:
    """Write the message to the file that torchrun's closing report reads.

    torchrun (and so `accelerate launch`) prints its own traceback over any rank that does not
    exit with 0; by this file, which is torch's documented way, its last lines say the reason.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        info = {"py_callstack": "\n" + text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as out:
            json.dump({"message": {"message": what, "extraInfo": info}}, out)
