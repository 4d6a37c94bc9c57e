"""Start scripts without importing the libraries again: three of a start's five seconds of CPU time.

A server process imports the libraries, never Stepladder itself, and forks once per command. The child gets the
command's words, folder and output files, and runs the script as `python scripts/NAME.py` does: it parses, checks and
exits by itself. A command whose environment differs from the tests' own is started as usual (`conftest.run`), since
libraries read theirs as they are imported.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "torch", "torch.distributed.tensor", "torch.distributed.fsdp", "datasets", "transformers", "transformers.trainer",
    "accelerate", "bitsandbytes", "peft", "trl", "trl.trainer.sft_trainer", "rich.console", "jinja2.sandbox",
)  # fmt: skip


class Server:
    """A process that has imported the libraries; it ends with the process that started it."""

    def __init__(self, env: dict[str, str]):
        self.env = env
        self.folder = tempfile.TemporaryDirectory(prefix="warm")
        self.address = f"{self.folder.name}/socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen()
        words = [sys.executable, __file__, str(listener.fileno())]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=env, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        listener.close()

    def run(self, words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run([sys.executable, *words])` gives."""
        pipes = [os.pipe(), os.pipe()]
        with socket.socket(socket.AF_UNIX) as wire, ThreadPoolExecutor(len(pipes)) as readers:
            wire.connect(self.address)
            socket.send_fds(wire, [json.dumps(words).encode()], [write for _, write in pipes])
            wire.shutdown(socket.SHUT_WR)
            for _, write in pipes:
                os.close(write)
            texts = [readers.submit(_read, read) for read, _ in pipes]
            answers = wire.makefile()
            child = int(answers.readline())
            wire.settimeout(timeout)
            try:
                code = int(answers.readline())
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
                raise subprocess.TimeoutExpired(words, timeout) from None
            return subprocess.CompletedProcess(words, code, *(text.result() for text in texts))


def _read(pipe: int) -> str:
    with open(pipe, encoding="utf-8") as text:
        return text.read()


def serve(listener: socket.socket) -> None:
    """Import the libraries, then fork per connection; return in each child, which is to run a script.

    The tests hold the other end of standard input: where it closes they have ended, and so does this process.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        wire, _ = listener.accept()
        if os.fork():
            wire.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        words, files, _, _ = socket.recv_fds(wire, 1 << 20, 2)
        child = os.fork()
        if not child:
            wire.close()
            listener.close()
            return become(json.loads(words), files)
        for file in files:
            os.close(file)
        wire.sendall(f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        wire.sendall(f"{code}\n".encode())
        os._exit(0)
    os._exit(0)


def become(words: list[str], files: list[int]) -> None:
    """Give this process the words and files of its command."""
    null = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((null, *files)):
        os.dup2(file, number)
        os.close(file)
    sys.argv = words
    sys.orig_argv = [sys.executable, *words]
    sys.path[0] = str((ROOT / words[0]).parent)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
