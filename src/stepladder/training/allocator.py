"""How memory is allocated, which is fixed before PyTorch is imported: on a CPU by tcmalloc in place of glibc's malloc.

With batches of ever other sizes glibc's heap gets holes that fit none of the next ones: recipes/lora.yaml grows from
3.5 GiB to 6.9 in 90 steps. Under tcmalloc it stays near 3, as fast (docs/benchmarks.md). An allocator can only come
before all else, so the process starts anew with it, once, before the slow imports.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # where there is one, it is the GPU's memory that counts
STARTED = "STEPLADDER_STARTED_WITH"


def use_tcmalloc() -> None:
    """Start this process anew under tcmalloc: the same command and process id; or do nothing.

    It does nothing where tcmalloc is not installed or a GPU is, and where LD_PRELOAD is set: that is someone's choice.
    """
    if library := os.environ.pop(STARTED, None):
        if os.environ.get("LD_PRELOAD") == library:
            del os.environ["LD_PRELOAD"]  # it is this process's, and not that of the commands that it runs
        return
    late = "torch" in sys.modules  # as in tests that import it once for many runs
    if late or os.environ.get("LD_PRELOAD") or any(map(os.path.exists, GPUS)):
        return
    if env := preload():
        env = {**os.environ, **env, STARTED: env["LD_PRELOAD"]}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def let_segments_grow() -> None:
    """On an NVIDIA GPU, let PyTorch's blocks of memory grow, unless someone has set how it allocates.

    Rows differ in length, and so do the blocks: else free memory lies in pieces too small to use.
    """
    if os.path.exists(GPUS[0]) and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def preload() -> dict[str, str]:
    """The environment in which a process has tcmalloc; empty where it is not installed."""
    for library in LIBRARIES if sys.platform == "linux" else ():
        # the second: or it prints a line at each block of 1 GiB
        env = {"LD_PRELOAD": library, "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": "0"}
        # Tried on another process: loaded into this one, it would be asked to free what is not its own.
        tried = subprocess.run([sys.executable, "-S", "-c", ""], env={**os.environ, **env}, capture_output=True)
        if not tried.returncode and not tried.stderr:  # where it cannot be loaded, the loader says so and goes on
            return env
    return {}


def name() -> str:
    """The allocator of this process, for run.json."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        return next((known for known in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{known}" in maps), "libc")
    return "libc"
