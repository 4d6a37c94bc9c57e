"""Commands of sft.py that run in the background, so that a test can do something to them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT

PATIENCE = 240  # seconds for a start on a busy machine


class Running:
    """A command of sft.py in the background, alone or under `accelerate launch`."""

    def __init__(self, *words: Any, ranks: int = 1, config: str = "ddp", log: Any = subprocess.PIPE, **env: str):
        command = [sys.executable, "scripts/sft.py", *map(str, words)]
        if ranks > 1:
            command[:1] = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
                           f"accelerate_configs/{config}.yaml", "--num_processes", str(ranks),
                           "--main_process_port", "0"]  # fmt: skip
        self.ranks = ranks
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env}, stdout=log,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_for(self, there: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not there():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)

    def pids(self) -> list[int]:
        """Of the ranks, in order."""
        if self.ranks == 1:
            return [self.process.pid]
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and "sft.py" in (folder / "cmdline").read_text():
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    found[next(int(e[5:]) for e in environment if e.startswith(b"RANK="))] = int(folder.name)
            except (OSError, StopIteration):
                continue
        return [found[rank] for rank in sorted(found)]

    def end(self) -> tuple[int, str]:
        if not self.process.stdout or self.process.stdout.closed:
            return self.process.wait(PATIENCE), ""
        out, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0
