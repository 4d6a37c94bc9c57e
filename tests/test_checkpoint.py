"""A checkpoint is whole or it is none, whatever died while it was written, and nothing in it can run code."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT
from stepladder import manifest
from stepladder import run as run_module
from stepladder.errors import CheckpointError, LaunchError
from stepladder.files import hash_file, write_atomic
from stepladder.manifest import STUCK_AFTER
from stepladder.recipe.recipe import Recipe
from stepladder.run import Run
from stepladder.training.checkpoint import resume

KEYS = {"model_name_or_path": "m", "learning_rate": 1e-3, "logging_steps": 1}


def recipe(folder: Path, **keys) -> Recipe:
    return Recipe(name="r", path=Path("r.yaml"), values={**KEYS, "output_dir": str(folder), **keys}, origins={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was killed at step 6, with checkpoints at 2, 4 and 6 of three small files each."""
    folder = tmp_path / "run"
    for step in (2, 4, 6):
        checkpoint = resume.of_step(folder, step)
        checkpoint.mkdir(parents=True)
        files = {}
        for name in ("model-0-0.safetensors", "state.json", "trainer_state.json"):
            (checkpoint / name).write_text(f"{name} of step {step}")
            files[name] = {
                "bytes": (checkpoint / name).stat().st_size, "sha256": hash_file(checkpoint / name)
            }  # fmt: skip
        write_atomic(checkpoint / resume.COMPLETE, json.dumps({"step": step, "resumable": True, "files": files}))
    (folder / "run.json").write_text(json.dumps({"status": "running", "recipe": KEYS}))
    return folder


def claim(folder: Path, how: str = "auto", overwrite: bool = False, allowed: tuple[str, ...] = (), **keys):
    run = Run(folder, is_writer=True)
    try:
        return resume.claim(run, recipe(folder, **keys), how, overwrite, list(allowed))
    finally:
        if hasattr(run, "_lock"):
            run._lock.release()  # as the end of a process does


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def list_files(checkpoint: Path, *names: str) -> None:
    """Let the mark list these files alone, each with the size and hash of the weights."""
    mark = json.loads((checkpoint / resume.COMPLETE).read_text())
    facts = mark["files"]["model-0-0.safetensors"]
    write_atomic(checkpoint / resume.COMPLETE, json.dumps(mark | {"files": dict.fromkeys(names, facts)}))


def replace_by_link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name(f"{path.name}.moved")))


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "nothing listed": lambda c: list_files(c),
    "no state listed": lambda c: list_files(c, "model-0-0.safetensors"),
    "a path listed": lambda c: list_files(c, "../checkpoint-4/model-0-0.safetensors"),
    "a device listed": lambda c: list_files(c, "/dev/zero"),
    "a link": lambda c: replace_by_link(c / "model-0-0.safetensors"),
    "a FIFO": lambda c: replace_by_fifo(c / "state.json"),
    "mark a link": lambda c: replace_by_link(c / resume.COMPLETE),
    "mark nested": lambda c: (c / resume.COMPLETE).write_text("[" * 100_000),
    "folder a link": replace_by_link,
    "another step's": lambda c: shutil.copytree(c.with_name("checkpoint-2"), c, dirs_exist_ok=True),
    "a bit": lambda c: flip_a_bit(c / "model-0-0.safetensors"),
    "cut": lambda c: (c / "model-0-0.safetensors").write_text("mod"),
    "gone": lambda c: (c / "state.json").unlink(),
    "mark cut": lambda c: (c / resume.COMPLETE).write_text('{"step": 6, "fil'),
    "mark empty": lambda c: (c / resume.COMPLETE).write_text(""),
    "mark of another kind": lambda c: (c / resume.COMPLETE).write_text('{"files": [1], "resumable": true}'),
}


def test_the_newest_whole_one_is_taken(folder) -> None:
    assert claim(folder) == resume.of_step(folder, 6)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_taken(damage, folder, capsys) -> None:
    """Guards against a failed load that becomes a fresh start, or the use of what a bad disk left."""
    DAMAGES[damage](resume.of_step(folder, 6))
    assert claim(folder) == resume.of_step(folder, 4)
    assert "checkpoint-6: " in capsys.readouterr().out
    assert not resume.of_step(folder, 6).exists(), "step 6, when it comes again, would be taken for saved"


def test_none_is_whole(folder) -> None:
    for step in (2, 4, 6):
        flip_a_bit(resume.of_step(folder, step) / "state.json")
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        claim(folder)
    assert caught.value.why.count("SHA-256") == 3


def test_a_dead_save_is_set_aside(folder, capsys) -> None:
    """Guards against a folder that looks complete: killed before its mark, it never was a checkpoint."""
    (resume.of_step(folder, 6) / resume.COMPLETE).unlink()
    assert claim(folder) == resume.of_step(folder, 4)
    assert (folder / "checkpoint-6.partial").is_dir()
    assert "cut off" in capsys.readouterr().out
    assert claim(folder) == resume.of_step(folder, 4)
    assert (folder / "checkpoint-6.partial").is_dir(), "a start that sets nothing aside removes nothing"


def test_leftovers_are_those_of_one_start(folder) -> None:
    """Guards the disk of a job that is queued again and again, and dies in each save."""
    for step in range(7, 12):
        shutil.copytree(resume.of_step(folder, 4), resume.of_step(folder, step))
        (resume.of_step(folder, step) / resume.COMPLETE).unlink()
        assert claim(folder) == resume.of_step(folder, 6)
        assert [path.name for path in folder.glob("*.partial*")] == [f"checkpoint-{step}.partial"]


def test_a_checkpoint_of_another_name_is_no_leftover(folder) -> None:
    """Guards a checkpoint that somebody renamed: the run does not start anew, which would remove it."""
    for step in (2, 4):
        shutil.rmtree(resume.of_step(folder, step))
    resume.of_step(folder, 6).rename(folder / "checkpoint-06")
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        claim(folder)
    assert caught.value.why.endswith("checkpoint-06: not the name of a checkpoint")


def test_a_run_without_checkpoints_starts_anew_and_says_so(folder, capsys) -> None:
    for step in (2, 4, 6):
        shutil.rmtree(resume.of_step(folder, step))
    assert claim(folder) is None
    assert "starts from the beginning" in capsys.readouterr().out


def test_another_recipe_is_refused_with_what_differs(folder) -> None:
    """Guards against a curve that changes halfway without a word; what is only shown may change."""
    with pytest.raises(LaunchError, match="unfinished run of another recipe") as caught:
        claim(folder, learning_rate=1e-4, logging_steps=5)
    assert caught.value.why == "learning_rate: 0.001 → 0.0001"
    assert "--allow_change learning_rate" in caught.value.help
    assert claim(folder, allowed=("learning-rate",), learning_rate=1e-4) == resume.of_step(folder, 6)


def test_a_rate_that_follows_a_metric_stays(folder) -> None:
    """Guards against a new rate that a plateau's schedule, which holds its own, would never use."""
    for change in ({"learning_rate": 1e-4, "lr_scheduler_type": "greedy"}, {"lr_scheduler_type": "greedy"}):
        with pytest.raises(LaunchError, match="cannot change as the run"):
            claim(folder, allowed=(*change,), **change)


def test_a_chosen_checkpoint(folder) -> None:
    assert claim(folder, how=str(resume.of_step(folder, 4))) == resume.of_step(folder, 4)
    assert claim(folder) == resume.of_step(folder, 4), "the newer ones are set aside"
    (folder / "latest").symlink_to(resume.of_step(folder, 4))
    (folder / "checkpoint-²").mkdir()
    for name in ("../elsewhere/checkpoint-4", "checkpoint-6.partial", "latest", "checkpoint-²", "checkpoint-04", "."):
        with pytest.raises(LaunchError, match="no checkpoint of the run"):
            claim(folder, how=str(folder / name))


@pytest.mark.parametrize(("status", "how"), [("finished", "auto"), ("running", "never")])
def test_what_stands_is_kept(status, how, folder) -> None:
    (folder / "run.json").write_text(json.dumps({"status": status, "recipe": KEYS}))
    with pytest.raises(LaunchError, match="holds a run"):
        claim(folder, how=how)
    assert claim(folder, how=how, overwrite=True) is None
    assert len(list(folder.glob("checkpoint-*"))) == 3, "until the new run has begun"


def test_a_kill_while_a_run_is_replaced(folder) -> None:
    """Guards the old run at each moment of its replacement: it is put back whole until the new one has a manifest."""
    before, old = sorted(path.name for path in folder.iterdir()), folder / run_module.REPLACED
    for moved in range(1, len(before) + 1):
        run = Run(folder, is_writer=True)
        old.mkdir()
        for file in run._files()[:moved]:
            file.rename(old / file.name)
        assert claim(folder) == resume.of_step(folder, 6)
        assert sorted(path.name for path in folder.iterdir()) == sorted([*before, manifest.LOCK])
    run = Run(folder, is_writer=True)
    resume.claim(run, recipe(folder), "auto", True, [])
    run.begin("", recipe=KEYS)
    run._lock.release()
    assert claim(folder) is None, "the new one has begun"
    assert (old / "checkpoint-6").is_dir(), "it has not trained"
    run.log({"step": 1})
    assert not list(folder.glob(".replaced*"))


def test_no_progress_over_three_starts(folder) -> None:
    """Guards a queue against a run that dies at the same step for ever."""
    for _ in range(STUCK_AFTER):
        run = Run(folder, is_writer=True)
        resume.claim(run, recipe(folder), "auto", False, [])
        run.update()  # it starts, and dies without a checkpoint
        run._lock.release()
    with pytest.raises(LaunchError, match="no progress"):
        claim(folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "stuck"
    assert claim(folder, how=str(resume.of_step(folder, 6))) == resume.of_step(folder, 6)


def test_two_processes_do_not_share_a_run(folder, monkeypatch) -> None:
    """Guards against the ranks of a launcher that died, which may still be training."""
    monkeypatch.setattr(run_module, "LOCK_PATIENCE", 0)
    first = Run(folder, is_writer=True)
    first.lock()
    with pytest.raises(LaunchError, match="another process is training"):
        claim(folder)
    first._lock.release()
    assert claim(folder)


def test_a_link_is_not_written_through(folder, tmp_path) -> None:
    """Guards other people's files against links of the run folder's own names."""
    (thesis := tmp_path / "thesis.tex").write_text("years of work")
    (folder / ".run.json.part").symlink_to(thesis)
    write_atomic(folder / "run.json", (folder / "run.json").read_text())
    (folder / manifest.LOCK).symlink_to(thesis)
    with pytest.raises(LaunchError, match=r"\.lock, a link, cannot be written"):
        claim(folder)
    assert thesis.read_text() == "years of work"


def test_metrics_are_rewound(folder) -> None:
    """No gap, no repeat, and no half line."""
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in (1, 3, 4, 4, 5)) + '{"step": 4, "l')
    Run(folder, is_writer=True)._rewind(4)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 3, 4, 4]


def write_files(folder: Path, pieces: dict[str, Any], written: tuple[str, ...] = ()) -> Any:
    from stepladder.training.checkpoint.writer import Writer, cut_into_parts

    writer = Writer(folder, cut_into_parts("model-0", [*pieces.items()]), [*written])
    writer.start()
    writer.wait(60)
    assert not writer.writes
    return writer


def test_a_fault_of_any_kind_is_told_and_ends_no_process(tmp_path) -> None:
    """Guards the writer's threads: an error in one is lost, and the checkpoint would be completed without its file."""
    import torch

    from stepladder.training.checkpoint.state import Piece

    piece = Piece(torch.zeros(100_000), 0, (100_000,), False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # stands for a full disk
    try:
        writer = write_files(tmp_path, {"weight": piece})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "model-0-0.safetensors: OSError: [Errno 27] File too large" in writer.fault and not writer.files
    assert "FileNotFoundError" in write_files(tmp_path, {}, ("state.json",)).fault
    unknown = piece._replace(values=torch.zeros(2, dtype=torch.complex64))
    assert "KeyError: 'complex64'" in write_files(tmp_path, {"weight": unknown}).fault


def test_files_and_hashes_are_those_of_safetensors(tmp_path, monkeypatch) -> None:
    """Guards the format, by safetensors' own reader, and hashes of the bytes that were written rather than read: for
    each dtype, numbers without dimensions, several files, and tensors larger than what is written at once."""
    import torch
    from safetensors.torch import load_file

    from stepladder.training.checkpoint import writer
    from stepladder.training.checkpoint.state import Piece

    monkeypatch.setattr(writer, "PART_BYTES", 5000)
    monkeypatch.setattr(writer, "CHUNK_BYTES", 700)
    draw = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): torch.randint(0, 2, (19, 23), generator=draw).to(dtype) for dtype in dtypes}
    tensors |= {"odd": torch.arange(3, dtype=torch.uint8), "step": torch.tensor(7.0), "turned": torch.rand(9, 5).T}
    done = write_files(tmp_path, {name: Piece(value, 0, tuple(value.shape), False) for name, value in tensors.items()})
    assert not done.fault and len(done.files) > 2
    found = {name: value for file in done.files for name, value in load_file(tmp_path / file).items()}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    for name, facts in done.files.items():
        content = (tmp_path / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def complete(folder: Path, *files: str) -> Path:
    """Mark a folder as a checkpoint of these files."""
    write_atomic(folder / resume.COMPLETE, json.dumps({"step": 2, "resumable": True, "files": dict.fromkeys(files)}))
    return folder


def test_a_range_is_read_from_whichever_files_hold_it(tmp_path) -> None:
    """Guards resumption on other ranks: any range of a tensor, whole in one file or cut anywhere over several."""
    import torch
    from safetensors.torch import save_file

    from stepladder.training.checkpoint.loading import open_tensors

    value = torch.arange(7 * 5 * 3.0).reshape(7, 5, 3)
    flat, files = value.flatten(), []
    for number, (start, stop) in enumerate([(40, 77), (0, 4), (77, 105), (4, 40)]):
        files.append(f"model-{number}-0.safetensors")
        save_file({f"cut@{start}": flat[start:stop].clone()}, tmp_path / files[-1],
                  {"shapes": json.dumps({f"cut@{start}": [7, 5, 3]})})  # fmt: skip
    save_file({"whole@1": value, "number": torch.tensor(3.0)}, tmp_path / "model-9-0.safetensors")
    found = open_tensors(complete(tmp_path, *files, "model-9-0.safetensors"), "model")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "cut": (7, 5, 3), "whole@1": (7, 5, 3), "number": ()
    }  # fmt: skip
    for name in ("cut", "whole@1"):
        for start, stop in [(0, 105), (0, 1), (3, 5), (14, 16), (39, 78), (50, 50), (104, 105), (105, 105)]:
            assert torch.equal(found[name].read(start, stop), flat[start:stop]), (name, start, stop)
    assert found["number"].read(0, 1).tolist() == [3.0]
    with pytest.raises(CheckpointError, match="a part of cut only"):
        open_tensors(complete(tmp_path, *files[:3]), "model")


def read_range(value: Any, start: int, stop: int) -> Any:
    return value.flatten()[start:stop]


@pytest.mark.parametrize("mesh", [(4,), (3,), (2, 2)])
def test_the_parts_of_all_ranks_are_the_whole(mesh: tuple[int, ...]) -> None:
    """Guards sizes that the ranks do not divide, and shards that several ranks hold (hybrid sharding), by PyTorch's own
    cut: each element is written once."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from stepladder.training.checkpoint.state import _fill, _piece

    ranks = math.prod(mesh)
    for shape in [(8, 3), (5, 2), (2, 3, 2), (1,), (7,)]:
        value, written = torch.rand(shape), []
        read = functools.partial(read_range, value)
        for rank in range(ranks):
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            try:
                placements = [Replicate(), Shard(0)][-len(mesh) :]
                sharded = distribute_tensor(value, init_device_mesh("cpu", mesh), placements, src_data_rank=None)
                piece, expected = _piece(sharded), sharded.to_local().clone()
                assert piece.sharded and piece.shape == shape
                written += [(piece.start, x) for x in [piece.values] if x.numel()]
                sharded.to_local().zero_()
                _fill(sharded, read)
                assert torch.equal(sharded.to_local(), expected)
            finally:
                dist.destroy_process_group()
        assert torch.equal(torch.cat([x for _, x in sorted(written, key=lambda part: part[0])]), value.flatten())


def test_a_checkpoint_of_an_earlier_version_is_read() -> None:
    """Guards runs that were begun before tensors were cut: a checkpoint that the code of 2026-11-29 has written."""
    import torch
    from safetensors.torch import load_file

    from stepladder.training.checkpoint.loading import open_tensors

    folder = ROOT / "tests/fixtures/whole_tensors/checkpoint-2"
    assert not resume.damage(folder)
    for kind in ("model", "optimizer"):
        expected = load_file(folder / f"{kind}-0-0.safetensors")
        found = open_tensors(folder, kind)
        assert found.keys() == expected.keys() and expected
        for name, value in expected.items():
            assert found[name].shape == tuple(value.shape)
            assert torch.equal(found[name].read(0, value.numel()), value.flatten())


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), OSError(30, "Read-only file system")])
def test_an_older_checkpoint_that_cannot_be_deleted_does_not_end_the_run(error, folder, monkeypatch, capsys) -> None:
    """Guards `save_total_limit` on a disk that refuses to delete, or beside a script that has deleted it already: rank
    0 ended with a traceback after its save was complete, and the other ranks waited for it."""
    from stepladder.training.checkpoint import saving
    from stepladder.training.checkpoint.writer import Writer

    trainer = SimpleNamespace(
        args=SimpleNamespace(process_index=0, output_dir=str(folder), device="cpu"),
        state=SimpleNamespace(best_global_step=None),
        watchdog=SimpleNamespace(move=lambda: None),
        save_total_limit=1,
        _best_before=(None, None),
    )
    newest = resume.of_step(folder, 8)
    newest.mkdir()
    writer = Writer(newest, [], [])
    writer.start()
    unlink = Path.unlink

    def refuse(file: Path, missing_ok: bool = False) -> None:
        if file.name == resume.COMPLETE:
            raise error
        unlink(file, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert saving.finish(trainer, saving.Save(newest, 8, {"step": 8}, writer, blocks=False))
    out = capsys.readouterr().out
    assert "an older checkpoint could not be deleted" in out and error.strerror in out
    assert resume.whole_steps(folder) == [2, 4, 6, 8]
