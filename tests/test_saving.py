"""A checkpoint is written while the training goes on: nothing that happens meanwhile makes it another one, or none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_resume import Session, difference

from background import Running
from conftest import manifest, metrics
from stepladder.training.checkpoint.resume import COMPLETE, damage, of_step, whole_steps

pytestmark = [pytest.mark.proof, pytest.mark.alone]

STEPS = 5
# Writers as slow as SECONDS a file, or as a disk that fails at one step; a signal, or an error, while they write.
SLOW = """
import os, signal, time
from transformers import TrainerCallback
from stepladder.training.checkpoint import saving, writer

saving.ROOM = float(os.environ.get("ROOM", saving.ROOM))
hash_written = writer.hash_written = getattr(writer, "hash_written", writer.Writer._hash_written)

def slow(self, name):
    end = time.monotonic() + float(os.environ.get("SECONDS", "0"))
    while time.monotonic() < end:
        time.sleep(0.1)
        self.moved += 1
    if self.folder.name == os.environ.get("FAILS"):
        raise OSError(28, "No space left on device")
    while self.folder.name == os.environ.get("STUCK"):
        time.sleep(1)
    return hash_written(self, name)

writer.Writer._hash_written = slow

class Callback(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("AT", "-1")):
            mark = f"{args.output_dir}/checkpoint-{state.global_step}/COMPLETE.json"
            assert not os.path.exists(mark), "it is complete already: the test shows nothing"
            if os.environ["WHAT"] == "signal" and args.process_index == args.world_size - 1:
                signal.raise_signal(signal.SIGTERM)
            if os.environ["WHAT"] == "error":
                raise RuntimeError("an error in a callback")
"""
READS = """
import os
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        assert os.path.exists(f"{args.output_dir}/checkpoint-{state.global_step}/COMPLETE.json")
        print("complete when it is read", flush=True)
"""
LAST = """
import signal
from transformers import TrainerCallback

class Callback(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGTERM)
"""


class Slow(Session):
    def keys(self, **more: Any) -> list[str]:
        return super().keys(**{"eval_strategy": "no", "max_steps": STEPS, "global_batch_size": 4} | more)

    def env(self, **values: Any) -> None:
        names = ("SECONDS", "FAILS", "AT", "WHAT", "ROOM")
        self.commands.append({"env": {name: None if name not in values else str(values[name]) for name in names}})


@pytest.mark.parametrize(("config", "ranks"), [("single", 1), ("fsdp", 2)])
def test_whatever_happens_while_a_checkpoint_is_written(config, ranks, tiny, learnable, tmp_path) -> None:
    """Guards the copy that is written (steps change the weights meanwhile), the next save, which waits; a stop, which
    completes both; a disk that fails in a thread; files that a callback reads; an error, after which one process still
    completes what it has; and no room for the copy, where the training waits."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "reads.py").write_text(READS)
    session, slow = Slow(tmp_path, tiny, learnable), ("--callback", tmp_path / "slow.py")
    whole = session.train("whole")
    session.train("read", "--callback", tmp_path / "reads.py")
    session.env(SECONDS=1)
    each = session.train("each", *slow)  # the next save comes while the last one is written
    resumed = session.resume(each, "resumed", 3)
    session.env(SECONDS=2, AT=2, WHAT="signal")
    stopped = session.train("stopped", *slow, save_steps=2)
    session.env()
    session.train("stopped", save_steps=2)
    session.env(FAILS="checkpoint-2")
    failed = session.train("failed", *slow, save_steps=2)
    session.env(ROOM=0)
    cramped = session.train("cramped", *slow, save_steps=2)
    session.env(ROOM=0.8)
    codes = [0, 0, 0, 0, 75, 0, 0, 0]
    if ranks == 1:
        session.env(SECONDS=2, AT=2, WHAT="error", ROOM=0.8)
        ended = session.train("ended", *slow, save_steps=2)
        codes.append(1)
    done = session.start(config, ranks, codes)
    for folder in (each, resumed, stopped, failed, cramped):
        assert max(difference(whole, folder).values()) <= (0 if ranks == 1 else 1e-6), folder
    assert whole_steps(each) == [*range(1, STEPS + 1)]
    assert [damage(of_step(each, step)) for step in whole_steps(each)] == [""] * STEPS
    assert manifest(stopped)["resumed"][0]["step"] == 3 and whole_steps(stopped) == [2, 3, 4, STEPS]
    assert whole_steps(failed) == [4, STEPS] and not of_step(failed, 2).exists()
    assert len(re.findall(r"could not write the checkpoint: \S+: OSError: \[Errno 28\]", done.out)) == 1, done
    assert done.out.count("host memory has no room for a copy") == 1 and whole_steps(cramped) == [2, 4, STEPS]
    assert done.out.count("complete when it is read") == STEPS * ranks
    if ranks == 1:
        assert whole_steps(ended) == [2] and not damage(of_step(ended, 2))


def test_a_slow_writer_is_no_hang_and_a_stuck_one_is_named(tiny, learnable, write_recipe, tmp_path) -> None:
    """Guards a save of many minutes, which the watchdog took for a hang; and a disk that never answers, in which the
    run stood without a word."""
    (tmp_path / "slow.py").write_text(SLOW)
    recipe = write_recipe(
        model_name_or_path=str(tiny), dataset_name=str(learnable), max_steps=4, global_batch_size=2, bf16=False,
        per_device_train_batch_size=1, gradient_checkpointing=False, save_strategy="steps", save_steps=2,
        hang_timeout=5, max_length=192, logging_steps=1,
    )  # fmt: skip
    words = ("--recipe", recipe, "--callback", tmp_path / "slow.py", "--output_dir")
    slow = Running(*words, tmp_path / "slow", SECONDS="8")
    stuck = Running(*words, tmp_path / "stuck", STUCK="checkpoint-2")
    code, out = slow.end()
    assert code == 0 and whole_steps(tmp_path / "slow") == [2, 4], out
    code, out = stuck.end()
    assert code == 1 and "nothing has moved for 5 s while " in out, out
    assert "checkpoint-2/" in manifest(tmp_path / "stuck")["error"]
    assert "in slow" in (tmp_path / "stuck/hang-rank-0.txt").read_text()
    assert not (of_step(tmp_path / "stuck", 2) / COMPLETE).exists()
    assert [row["step"] for row in metrics(tmp_path / "stuck")] == [1, 2, 3, 4]


def test_a_stop_after_the_last_step_does_not_end_the_verification_of_the_result(tiny, learnable, tmp_path) -> None:
    """Guards a signal that comes in or after the last step: the loss of the saved result was left as an evaluation is,
    and a run whose training was complete failed with a traceback."""
    (tmp_path / "last.py").write_text(LAST)
    session = Slow(tmp_path, tiny, learnable)
    folder = session.train("run", "--callback", tmp_path / "last.py", max_steps=2)
    session.start()
    assert manifest(folder)["status"] == "finished" and manifest(folder)["saved"]["loss"] > 0
