"""What goes wrong in a run is seen by all ranks, named, and ends it or not as the recipe says."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from background import Running, steps_logged
from conftest import manifest, metrics, run, script
from stepladder.errors import TrainingError
from stepladder.training.launch.launcher import Launch, Strategy

pytestmark = [pytest.mark.proof, pytest.mark.alone]


@pytest.fixture
def keys(tiny, learnable) -> dict:
    return {
        "model_name_or_path": str(tiny), "dataset_name": str(learnable), "max_steps": 6, "global_batch_size": 4,
        "per_device_train_batch_size": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "bf16": False,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
        "max_length": 192,
    }  # fmt: skip


def test_a_loss_that_is_no_number_stops_before_the_step(keys, write_recipe, tmp_path) -> None:
    """Guards against weights ruined in silence: a rate of 1e30 makes the second step's loss infinite or NaN."""
    folder = tmp_path / "run"
    done = script("sft", "--recipe", write_recipe(**keys), "--output_dir", folder, "--learning_rate", "1e30")
    assert done.code == 1 and "Traceback" not in done.err, done
    assert "of step 2 is not a finite number" in done.err and "its rows (counted from 0): [" in done.err, done
    assert manifest(folder)["status"] == "failed"
    assert [row["step"] for row in metrics(folder)] == [1]


@pytest.mark.parametrize("output", ["full", "unread", "closed", "ascii"])
def test_printing_never_ends_a_run(output, keys, write_recipe, tmp_path) -> None:
    """Guards a log on a full disk, `| head`, a closed terminal, and characters that a terminal lacks.

    Each of them was an exception of `print`: the run ended, or run.json said `finished` and the exit code 120.
    """
    folder = tmp_path / "run"
    words = [sys.executable, "scripts/sft.py", "--recipe", write_recipe(**keys), "--output_dir", folder]
    shell = {
        "full": '"$@" >/dev/full 2>&1',
        "unread": '{ "$@" 2>&1; echo $? >"$code"; } | true; exit $(cat "$code")',
        "closed": '"$@" >&- 2>&- <&-',
        "ascii": 'PYTHONIOENCODING=ascii "$@"',
    }[output]
    done = run("bash", "-c", shell, "bash", *words, code=str(tmp_path / "code"))
    assert (done.code, manifest(folder)["status"]) == (0, "finished"), done
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert (folder / "report.html").is_file()
    if output == "ascii":
        assert "\\u2714 6 steps" in done.out
    if output == "full":
        assert run("bash", "-c", shell, "bash", *words, "--max_steps", "x").code == 2


def test_an_answer_that_is_lost_is_a_failure() -> None:
    """Guards scripts whose result is what they print: a full disk is their failure, a reader that left is not."""
    check = f"{sys.executable} scripts/check.py --recipe lora --show 1"
    done = run("bash", "-c", f"{check} >/dev/full")
    assert done.code == 1 and "the output could not be written: No space left" in done.err, done
    done = run("bash", "-c", f'set -o pipefail; {check} | true; exit "${{PIPESTATUS[0]}}"')
    assert done.code == 0 and not done.err, done


@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_a_step_left_out_changes_nothing(config, keys, write_recipe, tmp_path) -> None:
    """Guards `on_nan: skip` on all ranks at once: one row's embedding is NaN in step 2, in that rank's loss only.

    The weights after it are those of a run that goes on: its losses are finite again.
    """
    folder = tmp_path / "run"
    model = with_a_nan(Path(keys["model_name_or_path"]), tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    rows = [{"input": f"Door {n}?", "output": "Open sesame."} for n in range(7)] + [{"input": "☃", "output": "Open."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        **keys | {"model_name_or_path": str(model), "dataset_name": str(data), "on_nan": "skip", "learning_rate": 1e-5,
                  "train_sampling_strategy": "sequential", "max_steps": 5}
    )  # fmt: skip
    running = Running("--recipe", recipe, "--output_dir", folder, ranks=2, config=config)
    code, out = running.end()
    assert code == 0, out
    assert "of step 2 is not a finite number, and the step is left out; its rows (counted from 0): [4, 5, 6, 7]" in out
    assert manifest(folder)["skipped_steps"] == [2, 4]
    assert [row["step"] for row in metrics(folder)] == [1, 3, 5]
    assert all(row["loss"] < 20 for row in metrics(folder))


def with_a_nan(source: Path, folder: Path) -> Path:
    """A copy of a model whose embedding of the snowman's first token is NaN."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    plain = set(tokenizer("Door 0123456? Open sesame.")["input_ids"])
    # not tied: else it would be in every row's output
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    token = next(t for t in tokenizer("☃")["input_ids"] if t not in plain)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(keys, write_recipe, tmp_path) -> None:
    """Guards a disk that fails for a while: a file lies where the first checkpoint's folder must go."""
    folder = tmp_path / "run"
    recipe = write_recipe(**keys)
    done = script("sft", "--recipe", recipe, "--output_dir", folder, "--max_steps", 2)
    assert done.code == 0, done
    (folder / "checkpoint-4").write_text("in the way")
    facts = manifest(folder) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(facts))
    done = script("sft", "--recipe", recipe, "--output_dir", folder, "--allow_change", "max_steps")
    assert done.code == 0, done
    assert "could not write the checkpoint: FileExistsError" in done.out
    found = sorted(file.parent.name for file in folder.glob("checkpoint-*/COMPLETE.json"))
    assert found == ["checkpoint-2", "checkpoint-6"]
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_leaves_a_run_that_goes_on(keys, write_recipe, tmp_path) -> None:
    """Guards the same command after a disk that was full at the begin, at the final save, and at the report.

    A limit on a file's size stands for the disk. The begin once left a folder that the next start took for no run's,
    a final save was a traceback, and a run whose page could not be written was called failed.
    """
    folder = tmp_path / "run"
    words = [sys.executable, "scripts/sft.py", "--recipe", write_recipe(**keys), "--output_dir", folder]
    script("sft", *words[2:-1], tmp_path / "other", "--max_steps", 2)  # its caches are written
    limited = ["bash", "-c", 'ulimit -f "$KIB" && exec "$@"', "bash", *words]

    begin = run(*limited, KIB="1")
    assert begin.code == 2 and "cannot be written: File too large" in begin.err, begin
    assert "Traceback" not in begin.err

    save = run(*limited, KIB="50")
    assert save.code == 1 and "the result could not be written" in save.err and "Traceback" not in save.err, save
    assert (manifest(folder)["status"], metrics(folder)[-1]["step"]) == ("failed", 6)

    done = run(*words)
    assert done.code == 0 and manifest(folder)["status"] == "finished", done
    reference = (folder / "model.safetensors").read_bytes()

    (folder / "run.json").write_text("")  # a power cut
    (folder / "loss.png").unlink()
    (folder / "loss.png").mkdir()  # in the way of the picture
    done = run(*words)
    assert done.code == 0 and f"is rebuilt from {folder}/checkpoint-6" in done.out, done
    assert f"the pages of {folder} are not whole: IsADirectoryError" in done.out, done
    assert (folder / "model.safetensors").read_bytes() == reference
    assert (manifest(folder)["status"], manifest(folder)["resumed"][-1]["step"]) == ("finished", 6)
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]

    (folder / "run.json").unlink()
    done = run(*words, "--max_steps", 7)
    assert done.code == 2 and "max_steps: 6 → 7" in done.err, done


def test_a_rank_that_hangs_ends_the_job_and_says_where(keys, write_recipe, tmp_path) -> None:
    """Guards against half an hour of nothing: a stopped rank is the plainest hang."""
    folder = tmp_path / "run"
    running = Running(
        "--recipe", write_recipe(**keys), "--output_dir", folder, "--max_steps", 3000, "--hang_timeout", 4,
        "--save_strategy", "no", ranks=2, PET_SHUTDOWN_TIMEOUT="2",
    )  # fmt: skip
    running.wait_for(lambda: steps_logged(folder) >= 2)
    os.kill(running.pids()[1], signal.SIGSTOP)
    code, out = running.end()
    assert code == 1, out
    assert "[rank 0] nothing has moved for 4 s" in out
    assert "all_reduce" in (folder / "hang-rank-0.txt").read_text() or "collective" in out
    assert "nothing has moved" in manifest(folder)["error"]


def test_a_rank_that_dies_is_named(keys, write_recipe, tmp_path) -> None:
    """Guards against a log full of the others' broken pipes: the launcher's report names the rank that was killed."""
    folder = tmp_path / "run"
    running = Running("--recipe", write_recipe(**keys), "--output_dir", folder, "--max_steps", 3000, ranks=2)
    running.wait_for(lambda: steps_logged(folder) >= 2)
    os.kill(running.pids()[1], signal.SIGKILL)
    code, out = running.end()
    assert code == 1, out
    root_cause = out[out.index("Root Cause") :]
    assert "rank      : 1" in root_cause and "SIGKILL" in root_cause, out
    assert "[rank 0] ended: it lost its connection to another rank" in out
    assert "gloo" not in root_cause
    assert manifest(folder)["status"] == "failed"


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero3", "hsdp"])
def test_out_of_memory_names_the_ways_down(strategy, settings) -> None:
    """Guards the message: a peak, and what costs least, with the global batch unchanged. The allocation is real."""
    import torch

    from stepladder.training.guard import interruptions

    recipe = settings(global_batch_size=32, per_device_train_batch_size=8, gradient_checkpointing=False)
    launch = Launch(2 if strategy != "single" else 1, 0, 0, 1, Strategy(strategy))
    message = r"out of memory on rank 0, which held \d+\.\d\d GiB"
    with pytest.raises(TrainingError, match=message) as caught, interruptions.explain_out_of_memory(recipe, launch, 8):
        torch.empty(1 << 55, dtype=torch.uint8)
    assert caught.value.exit_code == 1
    first, second, third = caught.value.help.splitlines()
    assert first.startswith("--per_device_train_batch_size 4 (the accumulation follows")
    assert second.startswith("--gradient_checkpointing true")
    assert {"zero3": "zero3_offload.yaml", "hsdp": "fsdp.yaml"}.get(strategy, "zero3.yaml") in third
    with pytest.raises(RuntimeError, match="something else"), interruptions.explain_out_of_memory(recipe, launch, 8):
        raise RuntimeError("something else")
