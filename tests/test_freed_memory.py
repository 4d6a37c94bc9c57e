"""What a step frees is kept for the next one, and what no step needs goes back to the system."""

from __future__ import annotations

import json
import sys

import pytest

from conftest import run

HOLES = """
import json, os, resource, sys
from stepladder.training import freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

freed_memory.keep()
give_back = freed_memory.GiveBack()
held = [bytearray(1 << 20) for _ in range(400)]
full = resident()
held = held[::2]  # a hole beside each block that stays
kept = resident()
before = faults()
held += [bytearray(1 << 20) for _ in range(100)]
again = faults() - before
del held[200:]
give_back.on_step_end(None, None, None)
early = resident()
freed_memory.EVERY = 0
give_back.on_step_end(None, None, None)
print(json.dumps([full, kept, early, resident(), again]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's calls")
def test_holes_go_back_to_the_system_but_not_at_each_step() -> None:
    """Guards both halves: a resident set that grows with every new batch size, and page faults at every activation."""
    done = run(sys.executable, "-c", HOLES)
    assert done.code == 0, done
    full, kept, early, given_back, faults = (float(number) for number in json.loads(done.out))
    assert kept > 0.95 * full, "freed blocks go back at once, and are mapped anew at the next step"
    assert faults < 1000, "blocks of the size of the holes do not lie in them"  # 100 MiB are 25,600 pages
    assert early > 0.95 * kept, "every step pays for it"
    assert full - given_back > 150 << 20, "200 MiB of holes stay"
