"""What is done for the person who waits: imports, and the end of a process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from stepladder import console


def test_imports_leave_the_collector_as_it_was() -> None:
    """Guards training: whose garbage may hold tensors, and is found as soon as ever, even after a failed import."""
    usual = gc.get_threshold()
    try:
        with pytest.raises(ImportError), console.quick_imports():
            assert gc.get_threshold()[0] > usual[0]
            raise ImportError
        assert gc.get_threshold() == usual
    finally:
        gc.unfreeze()


def test_imports_load_no_compiler() -> None:
    """Guards a second of each start, which bitsandbytes' decorators took, and `torch_compile`, which comes later."""
    program = (
        "import os, sys; from stepladder import console\n"
        "with console.quick_imports():\n"
        "    import peft, torch\n"
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)\n"
        "print(console.NO_COMPILER in os.environ)\n"
        "seen = []\n"
        "torch.compile(lambda x: x + 1, backend=lambda graph, _: seen.append(graph) or graph)(torch.ones(1))\n"
        "print(len(seen))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != console.NO_COMPILER}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True False\nFalse\n1\n"), done.stderr


@pytest.mark.parametrize(("rank", "searched"), [(None, False), ("0", True)], ids=["one process", "a rank"])
def test_what_is_searched_at_the_end(rank: str | None, searched: bool) -> None:
    """Guards the second and more between a run's last line and its exit; and a rank, whose process groups end in that
    search: without it a launch of two seems to have failed once after all was done (its output is lost)."""
    program = (
        "import atexit, gc; from stepladder import errors\n"
        "atexit.register(lambda: print(gc.get_freeze_count() == 0))\n"
        "errors.exit_with(lambda: 0)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | ({"RANK": rank} if rank else {})
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{searched}\n"


def test_process_groups_end_with_the_work() -> None:
    """Guards the last lines of a run on several GPUs: NCCL warns of a leak where a group is left to the exit."""
    program = (
        "import atexit, torch.distributed as dist; from stepladder import errors\n"
        "atexit.register(lambda: print(dist.is_initialized()))\n"
        "def main():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    print(dist.is_initialized())\n"
        "errors.exit_with(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"RANK": "0"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "True\nFalse\n"), done.stderr


@pytest.mark.parametrize("rank", [None, "1"])
def test_a_full_disk_is_a_message_on_a_rank_too(rank) -> None:
    """Guards the traceback of whatever was being written as the disk became full."""
    program = (
        "import errno, os\nfrom stepladder import errors\n"
        "def main():\n    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'model.safetensors')\n"
        "errors.exit_with(main)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | ({"RANK": rank} if rank else {})
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    said = f"[rank {rank}] " * bool(rank) + "✘ error: model.safetensors cannot be written"
    assert done.returncode == 1 and done.stderr.startswith(said) and "Traceback" not in done.stderr, done
