"""Several runs of scripts/sft.py in one launch, each in processes of its own.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 tests/many_runs.py JOBS.json

Each rank imports the libraries once and forks for every run: the launcher, its environment and the
script are the real ones, and ten seconds of imports a run are saved. JOBS.json is a list of
`{"argv": [...], "port": N, "log": FILE}`; a run whose rank fails leaves `LOG.failed`, which holds its exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

GRACE = 5.0  # seconds for what this rank finds wrong by itself


def main(each: Callable[[dict, int], None]) -> None:
    from stepladder import console
    from stepladder.training.launch import launcher

    console.quiet_libraries()
    with console.quick_imports():
        import_all()
    launch = launcher.read_launch()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        failed = Path(f"{job['log']}.failed")
        if (child := os.fork()) == 0:
            each(job, launch.rank)
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                if status:
                    failed.write_text(str(os.waitstatus_to_exitcode(status)))
                break
            if failed.exists() and time.time() - failed.stat().st_mtime > GRACE:
                # another rank's part of this run ended: this one would wait for it for ever
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)


def import_all() -> None:
    """What sft.py imports; no thread is started by it, which a fork would lose."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import bitsandbytes  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from stepladder.data import prepare, templates  # noqa: F401
    from stepladder.model import build, pretrained  # noqa: F401
    from stepladder.training import arguments, result, trainer  # noqa: F401


def run(job: dict, rank: int) -> None:
    """This rank's part of one run, in the forked process; does not return."""
    os.environ |= {"MASTER_PORT": str(job["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    log = os.open(job["log"] if rank == 0 else f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = job.get("script", "scripts/sft.py")
    sys.argv = [script, *job["argv"]]
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(run)
