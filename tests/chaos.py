"""Do to runs what clusters do, and see whether their curves notice.

    make chaos

Each history takes a strategy, an uninterrupted run of it, and a second run that is killed, signalled, halted, robbed
of its disk, its log or of bytes in its checkpoints at random moments, and started each time by the same command. In
the end both must have the same rows and losses at every step, each step once. A start on an edited base, tokenizer or
row must be refused. The seed decides everything but the machine's speed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from background import Running, steps_logged
from conftest import manifest, metrics
from stepladder.training.checkpoint.resume import COMPLETE, of_step, step_of, whole_steps
from tiny import make_tiny

STRATEGIES = {"single": 1, "ddp": 2, "fsdp": 2, "zero2": 2, "zero3": 2}
STEPS, SAVE_STEPS, FAULTS = 24, 2, 4  # of a history
TOLERANCE = 1e-6  # a resumed run adds up in the same order as its reference
SLOW = 0.4  # seconds that each file of a checkpoint takes longer, of some starts: tiny ones are written at once
SLOW_WRITES = """
import os, time
from transformers import TrainerCallback as Callback
from stepladder.training.checkpoint import writer

hash_written = writer.Writer._hash_written

def slow(self, name):
    time.sleep(float(os.environ["SLOW"]))
    return hash_written(self, name)

writer.Writer._hash_written = slow
"""
HALT = 5  # seconds, many times what a collective takes
SMALL = 30_000  # bytes a file: a checkpoint's are larger, run.json and metrics.jsonl are not
COMPARED = ("loss", "grad_norm", "learning_rate", "rows_checksum", "tokens")


class History:
    """One run through its faults."""

    def __init__(self, folder: Path, keys: dict[str, Any], strategy: str, draw: random.Random, counts: Counter[str]):
        self.folder, self.strategy, self.draw = folder, strategy, draw
        self.recipe, self.keys = folder.with_suffix(".json"), keys
        self.recipe.write_text(json.dumps(keys))
        self.writes = folder.with_name("slow_writes.py")
        self.writes.write_text(SLOW_WRITES)
        self.lost = 0  # steps that a fault undid
        self.log: list[str] = []
        self.kinds = counts

    def start(self, disk: int | None = None, log: Any = subprocess.PIPE, slow: float = 0) -> Running:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk or before[0], before[1]))  # inherited
        try:
            return Running(
                "--recipe", self.recipe, "--output_dir", self.folder, "--callback", self.writes, SLOW=str(slow),
                ranks=STRATEGIES[self.strategy], config=self.strategy, log=log, HF_HUB_OFFLINE="1",
                PET_SHUTDOWN_TIMEOUT="60",
            )  # fmt: skip
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def suffer(self, name: str) -> bool:
        """One start with one fault; whether the run goes on."""
        began, saved = self._step(), len(whole_steps(self.folder))
        if (name in DAMAGES | ADDED and saved < 2) or (name in EDITED and not saved):
            name = "killed"  # a run whose only checkpoint is damaged is rightly refused, one without any begins anew
        self.kinds[name] += 1
        if name in EDITED:
            self._refuse_edit(name, EDITED[name])
            return True
        with open("/dev/full", "w") as full:
            log = full if name == "full log" else subprocess.PIPE
            slow = SLOW if name in WRITING or self.draw.random() < 0.3 else 0  # the next save comes while it writes
            running = self.start(SMALL if name == "disk full" else None, log, slow)
        beside = self.start() if name == "two starts" else None
        more = 1 if name in ("signal", "hangup", "disk full") else self.draw.randint(SAVE_STEPS + 1, 2 * SAVE_STEPS)
        if name in WRITING:
            self._until(running, self._writes)
        elif name == "killed while saving":
            saves = set(self.folder.glob("checkpoint-*"))
            self._until(running, lambda: bool(set(self.folder.glob("checkpoint-*")) - saves))
        elif name != "killed while starting":
            self._until(running, lambda: self._step() >= min(began + more, STEPS))
        else:
            time.sleep(self.draw.uniform(0.5, 6))
        time.sleep(self.draw.uniform(0, 0.3))
        if running.process.poll() is None:
            self._strike(running, name)
        _, out = running.end()
        if beside:  # it has waited for the other, or has found out that it cannot
            code, theirs = beside.end()
            out += theirs
            assert code == 0 or "another process is training" in theirs, out
        self._until_gone(running)
        self.log.append(f"--- {name} (from step {began})\n{out}")
        reached = self._step()
        if name in DAMAGES | ADDED:
            (DAMAGES | ADDED)[name](self._newest(), self.draw)
        if (status := manifest(self.folder)["status"] if (self.folder / "run.json").is_file() else "") != "finished":
            whole = whole_steps(self.folder)[: -1 if name in DAMAGES else None]
            self.lost = max(self.lost, reached - max([0, *(step for step in whole if step <= reached)]))
        return status != "finished"

    def _strike(self, running: Running, name: str) -> None:
        pids = self.pids = running.pids() or [running.process.pid]
        if name in ("signal", "hangup", "signal while writing"):
            kind = signal.SIGHUP if name == "hangup" else self.draw.choice([signal.SIGTERM, signal.SIGUSR1])
            for pid in self.draw.choice([pids, pids[-1:], [running.process.pid]]):
                _send(pid, kind)
                time.sleep(self.draw.choice([0.02, 0.15]))
        elif name == "launcher killed":
            _send(running.process.pid, signal.SIGKILL)
        elif name in GOES_ON:
            if name == "reader gone":
                running.process.stdout.close()
            elif name == "stopped for a while":
                halted = self.draw.choice(pids)
                _send(halted, signal.SIGSTOP)
                time.sleep(HALT)
                _send(halted, signal.SIGCONT)
            step = self._step()
            self._until(running, lambda: self._step() >= min(step + 1, STEPS))
            _send(self.draw.choice(pids), signal.SIGKILL)
        else:
            _send(self.draw.choice(pids), signal.SIGKILL)

    def _refuse_edit(self, name: str, edit: Callable[[dict[str, Any]], Path]) -> None:
        """A start on something else than the run began with must be refused; it is put back for the next one."""
        file = edit(self.keys)
        whole = file.read_bytes()
        content = bytearray(whole)
        place = content.index(b"owl") if b"owl" in content else len(content) - self.draw.randrange(1, 999)
        content[place] ^= 1
        file.write_bytes(content)
        try:
            code, out = self.start().end()
        finally:
            file.write_bytes(whole)
        self.log.append(f"--- {name}\n{out}")
        assert code and "help" in out, f"{name} was not refused: {out}"

    def _until(self, running: Running, there: Callable[[], bool]) -> None:
        end = time.monotonic() + 300
        while not there() and running.process.poll() is None:
            assert time.monotonic() < end, f"no progress: {self.folder}"
            time.sleep(0.02)

    def _until_gone(self, running: Running) -> None:
        """Ranks may outlive their launcher for a step and a save."""
        end = time.monotonic() + 120
        while any(Path(f"/proc/{pid}").exists() for pid in getattr(self, "pids", [])):
            assert time.monotonic() < end, "a rank runs on"
            time.sleep(0.05)

    def _writes(self) -> bool:
        return any(not (path / COMPLETE).exists() for path in self.folder.glob("checkpoint-*") if step_of(path))

    def _step(self) -> int:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines() if steps_logged(self.folder) else []
        found = [int(match[1]) for line in lines if (match := re.match(r'\{"step": (\d+),', line))]
        return max(found, default=0)

    def _newest(self) -> Path:
        return of_step(self.folder, max(whole_steps(self.folder), default=0))


def _send(pid: int, kind: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, kind)


def _flip(checkpoint: Path, draw: random.Random) -> None:
    if file := _any_file(checkpoint, draw):
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)


def _cut(checkpoint: Path, draw: random.Random) -> None:
    if file := _any_file(checkpoint, draw):
        os.truncate(file, draw.randrange(file.stat().st_size))


def _any_file(checkpoint: Path, draw: random.Random) -> Path | None:
    files = sorted(file for file in checkpoint.glob("*") if file.name != "COMPLETE.json")
    return draw.choice(files) if files else None


def _add_copy(checkpoint: Path, draw: random.Random) -> None:
    """What a synchronizer or a person leaves: an older checkpoint's weights beside the listed ones."""
    older = of_step(checkpoint.parent, whole_steps(checkpoint.parent)[-2])
    for file in older.glob("model-*"):
        name = draw.choice(["{}_old.safetensors", "{}.sync-conflict-20261129-120000.safetensors", "{}-1.safetensors"])
        shutil.copy(file, checkpoint / name.format(file.stem))


Damage = Callable[[Path, random.Random], None]
DAMAGES: dict[str, Damage] = {"killed, a bit flipped": _flip, "killed, a file cut": _cut}
ADDED: dict[str, Damage] = {"killed, a copy added": _add_copy}  # which costs nothing
EDITED: dict[str, Callable[[dict[str, Any]], Path]] = {
    "base edited": lambda keys: Path(keys["model_name_or_path"]) / "model.safetensors",
    "tokenizer edited": lambda keys: Path(keys["model_name_or_path"]) / "tokenizer.json",
    "rows edited": lambda keys: Path(keys["dataset_name"]),
}
GOES_ON = ("reader gone", "full log", "stopped for a while")  # the run, which is killed a step later
WRITING = ("killed while writing", "signal while writing")  # with slow writers
FAULT_KINDS = (
    "killed", "killed while saving", *WRITING, "killed while starting", "launcher killed", "two starts", "signal",
    "hangup", "disk full", *GOES_ON, *DAMAGES, *ADDED, *EDITED,
)  # fmt: skip
LABELS = {  # of the page, where the name alone is unclear
    "killed while writing": "killed while a checkpoint is written beside the training",
    "signal while writing": "SIGTERM or SIGUSR1 while one is written",
    "two starts": "started twice at once",
    "signal": "SIGTERM or SIGUSR1",
    "hangup": "SIGHUP",
    "reader gone": "the reader of its output exits, then killed",
    "full log": "the log's disk is full, then killed",
    "stopped for a while": f"a rank stopped for {HALT} s, then killed",
}
WITHOUT_PROGRESS = {
    "killed while starting",
    "disk full",
    "killed while saving",
    "killed while writing",
}  # three in a row would be `stuck`


def compare(reference: Path, run: Path) -> str:
    """What differs, or nothing."""
    first, second = ([row for row in metrics(folder) if "loss" in row] for folder in (reference, run))
    if [row["step"] for row in second] != list(range(1, STEPS + 1)):
        return f"steps {[row['step'] for row in second]}"
    for x, y in zip(first, second, strict=True):
        for key in COMPARED:
            if abs(x[key] - y[key]) > TOLERANCE:
                return f"step {x['step']}: {key} {x[key]} and {y[key]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="faults in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="default: a random one of half a million parameters")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--report", type=Path, help="the page whose <!-- chaos --> table is replaced")
    args = parser.parse_args()
    draw, counts, lost, broken = random.Random(args.seed), Counter[str](), 0, []
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    data = work / "rows.jsonl"
    rows = [{"input": f"Door {n}?", "output": "Open sesame" + ", said the owl" * (n % 3)} for n in range(22)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "model_name_or_path": args.model or str(make_tiny(work / "tiny")), "dataset_name": str(data), "use_peft": True,
        "lora_dropout": 0.1,
        "lora_r": 32, "lora_target_modules": "all-linear", "max_steps": STEPS, "global_batch_size": 4,
        "per_device_train_batch_size": 1, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 3,
        "max_length": 128,
    }  # fmt: skip
    references: dict[str, Path] = {}
    while counts.total() < args.runs:
        strategy = args.strategies[len(references)] if len(references) < len(args.strategies) else ""
        strategy = strategy or draw.choice(args.strategies)
        if strategy not in references:
            references[strategy] = work / f"reference-{strategy}"
            code, out = History(references[strategy], keys, strategy, draw, counts).start().end()
            assert code == 0, out
        history, idle = History(work / f"run-{counts.total()}-{strategy}", keys, strategy, draw, counts), False
        for _ in range(min(FAULTS, args.runs - counts.total())):
            name = draw.choice([kind for kind in FAULT_KINDS if not (idle and kind in WITHOUT_PROGRESS)])
            idle = name in WITHOUT_PROGRESS
            goes_on = history.suffer(name)
            print(f"{counts.total():>4} {strategy:7} {history.log[-1].splitlines()[0][4:]}", flush=True)
            if not goes_on:
                break
        code, out = history.start().end() if goes_on else (0, "")
        lost = max(lost, history.lost)
        fault = f"exit code {code}: {out[-3000:]}" if code else compare(references[strategy], history.folder)
        if fault:
            broken.append(f"{history.folder.name}: {fault}")
            print("BROKEN", broken[-1], *history.log, sep="\n", flush=True)
        else:
            shutil.rmtree(history.folder)
    table = report(counts, lost, broken, args)
    print(table)
    if args.report:
        page = args.report.read_text()
        args.report.write_text(re.sub(r"(?s)(<!-- chaos -->\n).*(<!-- /chaos -->)", rf"\g<1>{table}\g<2>", page))
    if not broken:
        shutil.rmtree(work)
    return 1 if broken else 0


def report(counts: Counter[str], lost: int, broken: list[str], args: argparse.Namespace) -> str:
    lines = [f"| {LABELS.get(name, name)} | {counts[name]} |" for name in FAULT_KINDS if counts[name]]
    when = datetime.date.today().isoformat()
    return "\n".join(
        (
            f"`python tests/chaos.py --runs {counts.total()} --seed {args.seed}`, {when}, "
            f"strategies {', '.join(args.strategies)}; a checkpoint every {SAVE_STEPS} steps.",
            "",
            "| fault | count |",
            "| --- | --- |",
            *lines,
            f"| **most steps lost to one fault** | {lost} |",
            f"| **runs whose rows or losses differ from the uninterrupted run's** | {len(broken)} |",
            "",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
