"""Output for a person: printed by rank 0 alone and escaped; libraries silenced and imported quickly."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from typing import Any

NO_COMPILER = "TORCHDYNAMO_DISABLE"  # PyTorch's own switch: `torch.compile` returns the function as it is
# What steers a terminal: C0 without tab and newline, DEL, C1 (U+009B begins a sequence as ESC [ does), and the
# characters that part or reorder lines (https://trojansource.codes).
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Print on rank 0 only."""
    if is_main_rank():
        # Escaped here too: beside a progress bar, rich stands in stdout's place and obeys colours.
        print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print on stderr, on rank 0 only."""
    if is_main_rank():
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Escape control characters except tab and newline, so that text of unknown origin cannot steer a terminal.

    From DEL on the escapes are JSON's, so that JSON stays JSON (in which the lower ones are escaped already).
    """
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] < " " else f"\\u{ord(found[0]):04x}", text)


def quote_for_shell(*words: object) -> str:
    """Words as a shell takes them, on one line: for commands that are printed to be typed."""
    return " ".join(_shell_word(str(word)) for word in words)


def _shell_word(word: str) -> str:
    if sys.platform == "win32":
        import subprocess

        return subprocess.list2cmdline([word])
    if word.isprintable():
        return shlex.quote(word)
    code = {}
    for c in word:
        if not c.isprintable() or c in "'\\":  # a byte of a file's name that is no UTF-8 is U+DC80 to U+DCFF in Python
            name = c.encode("utf-8", "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass")
            code[c] = "".join(f"\\x{byte:02x}" for byte in name)
    return "$'" + "".join(code.get(c, c) for c in word) + "'"


def redraw(text: str) -> None:
    """Write a line over the last one."""
    write_exactly("\r" + printable(text))
    sys.stdout.flush()


def write_exactly(text: str) -> None:
    """Write on stdout with control characters: what we draw, or what a program reads; never for a person to read."""
    getattr(sys.stdout, "write_exactly", sys.stdout.write)(text)


class _Output(io.FileIO):
    """A standard stream that never raises: what cannot be written is dropped, and the first error is kept."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


class _Printable(io.TextIOWrapper):
    """A text stream whose content cannot steer the terminal."""

    def write(self, text: str, /) -> int:
        super().write(printable(text))
        return len(text)

    def write_exactly(self, text: str) -> None:
        super().write(text)


def keep_printing() -> None:
    """Replace stdout and stderr by streams that never raise, so that no `print`, of a library either, ends the work.

    Nor does what is printed on stdout steer the terminal (`printable`). stderr stays as it is: libraries draw there.

    A full disk, a pipe whose reader has left and a terminal that was closed lose the text. A character that the
    terminal's encoding lacks is written as its escape. A stream that was closed before the start is opened on
    /dev/null: the next file that is opened would take its number, and what native code prints would go into that file.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetConsoleOutputCP(65001)  # UTF-8: the console's own code page lacks ✔
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        with contextlib.suppress(OSError, AttributeError):
            old.flush()
        raw = _Output(number, "w", closefd=False)
        kind = _Printable if name == "stdout" else io.TextIOWrapper
        stream = kind(
            io.BufferedWriter(raw),
            encoding="utf-8" if sys.platform == "win32" else getattr(old, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=getattr(old, "line_buffering", True),
        )
        setattr(sys, name, stream)


def lost_output() -> str:
    """Why stdout does not hold all that was printed; empty where it does, or where its reader left (`| head`)."""
    sys.stdout.flush()
    lost = getattr(getattr(sys.stdout.buffer, "raw", None), "lost", None)
    return "" if lost is None or lost.errno == errno.EPIPE else str(lost.strerror)


def quiet_libraries() -> None:
    """Silence what libraries say at import and load that asks nothing of the user.

    Call before importing them. Errors and real warnings of training still come through.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, a bar is a line at each of its steps
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    import logging

    # bitsandbytes looks for an optional kernel package at import and warns that it is absent;
    # DeepSpeed warns on every machine without a GPU.
    for name in ("bitsandbytes", "DeepSpeed", "torchao", "kernels", "torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Under ZeRO, Accelerate warns that it was told another accumulation than DeepSpeed. It is: the Trainer counts the
    # micro-batches itself and leaves it 1 (`create_accelerator_and_postprocess`), while DeepSpeed has the recipe's.
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Without a GPU, pinning host memory has no effect, and PyTorch says so once a loader.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to.*")  # of GPT-2's Conv1D, and PEFT mends it
    warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh.*")  # by Accelerate, for HSDP
    # PEFT counts positions itself behind virtual tokens, and says so at each answer.
    warnings.filterwarnings("ignore", message="Position ids are not supported.*")


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import libraries quickly inside: without a compiler, with rare garbage collection, and none of them afterwards.

    Collecting half a million objects that stay took a sixth of the imports, and a second later on. In a rank they are
    collected again afterwards: see `errors.exit_with`. The compiler is TorchInductor, a second more: bitsandbytes
    decorates four functions by `torch.compile` as it is imported (`_try_torch_compile`), for machines that it has no
    kernels for. What is compiled later is compiled as usual.
    """
    usual, compiles = gc.get_threshold(), os.environ.get(NO_COMPILER)
    gc.set_threshold(50_000)  # 700 by default. Not off: what is garbage would stay for good
    os.environ[NO_COMPILER] = "1"
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        if compiles is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = compiles
        if "RANK" not in os.environ:
            gc.freeze()


def quiet_progress_bars() -> None:
    """Disable the progress bars for loading and mapping; call after the imports."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
