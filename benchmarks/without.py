"""Run a script without some of what Stepladder does by itself, to measure what that is worth.

    python benchmarks/without.py held,sorted scripts/sft.py --recipe lora

These have no keys in a recipe: they change nothing but the speed. `malloc` leaves out tcmalloc, and glibc's stays.
"""

from __future__ import annotations

import functools
import runpy
import sys

from stepladder.training.launch import devices

if "malloc" not in sys.argv[1].split(","):
    devices.use_tcmalloc()  # before the next imports bring PyTorch

from stepladder.data import prepare
from stepladder.model import attention, build, cpu_kernels

WITHOUT = {
    "malloc": lambda: None,  # above
    "held": lambda: setattr(build, "hold_as_computed", lambda model, precision: None),
    "fused": lambda: setattr(build, "attach_adapter", functools.partial(_plain, build.attach_adapter)),
    "short": lambda: setattr(cpu_kernels, "SHORT", 0),  # products in bf16
    "flat": lambda: setattr(attention, "by_row", lambda *_: False),
    "loss": lambda: setattr(cpu_kernels, "attach_loss", lambda model, ignored: None),
    "cached": lambda: setattr(cpu_kernels, "CACHED", cpu_kernels.TOKENS),  # a few tokens' logits in fp32 at a time
    "sorted": lambda: setattr(prepare, "lengths", lambda rows: [0] * len(rows)),
}


def _plain(attach, *args, fused: bool):
    return attach(*args, fused=False)


if __name__ == "__main__":
    for name in filter(None, sys.argv[1].split(",")):
        WITHOUT[name]()
    del sys.argv[:2]
    sys.path.insert(0, "scripts")
    runpy.run_path(sys.argv[0], run_name="__main__")
