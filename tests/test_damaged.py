"""Damaged or hostile files, and names that no file can have: one message within a second, and nothing hangs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import script
from stepladder import files, manifest
from stepladder import run as runs_folder
from stepladder.cluster import job, sweep
from stepladder.data import read
from stepladder.data.templates import check_path
from stepladder.errors import DataError, ModelError, RecipeError, StepladderError
from stepladder.evaluation import metrics
from stepladder.model import card, pretrained
from stepladder.recipe import load
from stepladder.reporting import markdown, page, runs
from stepladder.training.checkpoint import resume

PATIENCE = 20  # seconds: what waits for a pipe waits for ever
SECOND = 2.0  # what is said within a second where nothing else runs
LONG = "x" * 300


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        raise AssertionError(f"nothing was said within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def made(kind: str, path: Path) -> Path:
    """A file that is none, under this name."""
    {
        "a folder": lambda: path.mkdir(),
        "a pipe": lambda: os.mkfifo(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "of another encoding": lambda: path.write_bytes(b'max_steps: 3 # \xe9\xff\n{"a": "\xe9\xff"}'),
        "a gigabyte": lambda: [path.touch(), os.truncate(path, 1 << 30)],
    }[kind]()
    return path


NO_FILES = ("a folder", "a pipe", "a device", "a link to nothing", "a link to itself")
NO_TEXTS = (*NO_FILES, "of another encoding", "a gigabyte")

# ---- recipes and what else a user names

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
EXCESSIVE = {
    "aliases that multiply": LAUGHS,
    "aliases that multiply in a value": f"lr_scheduler_kwargs: {{{LAUGHS.replace(chr(10), ', ')}}}\n",
    "brackets": "target: " + "[" * 3000,
    "brackets on lines": "[\n" * 3000,
    "levels": "".join(" " * level + "a:\n" for level in range(60)),
    "levels by aliases": "a0: &a0 {x: {x: {x: 1}}}\n"
    + "".join(f"a{n}: &a{n} {{x: {{x: {{x: *a{n - 1}}}}}}}\n" for n in range(1, 30)),
    "a block in itself": "a: &a\n  b: *a\n",
    "a character beyond all": 'run_name: "\\UFFFFFFFF"\n',
}


@pytest.mark.parametrize("name", EXCESSIVE)
def test_a_recipe_that_grows_is_refused(name: str, tmp_path: Path) -> None:
    """Guards memory and time against a few lines of YAML that stand for gigabytes, and against a RecursionError."""
    file = tmp_path / "r.yaml"
    file.write_text(EXCESSIVE[name])
    began = time.perf_counter()
    with pytest.raises(RecipeError, match=rf"(?s){file}"):
        load.load(str(file), [])
    assert time.perf_counter() - began < SECOND
    for other, error in ((metrics.read_rubric, DataError), (sweep.read_sweep, RecipeError)):
        with pytest.raises(error):
            other(file)


def test_aliases_are_read_where_they_are_few(tmp_path: Path) -> None:
    """Guards what YAML has them for."""
    file = tmp_path / "r.yaml"
    file.write_text("dataset_name: &data data/techco_train.jsonl\neval_dataset_name: *data\neval_strategy: epoch\n")
    recipe = load.load(str(file), [])
    assert recipe.get("dataset_name") == recipe.get("eval_dataset_name")


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_a_file_that_is_none_is_refused(kind: str, tmp_path: Path, settings: Any) -> None:
    """Guards against waiting for a pipe, and against reading a device or a gigabyte, wherever a user names a file."""
    file = made(kind, tmp_path / "r.yaml")
    template, rows = made(kind, tmp_path / "t.jinja"), made(kind, tmp_path / "rows.jsonl")
    readings: list[tuple[Callable[[], Any], type[StepladderError]]] = [
        (lambda: load.load(str(file), []), RecipeError),
        (lambda: load.load("r", []), RecipeError),
        (lambda: metrics.read_rubric(file), DataError),
        (lambda: sweep.read_sweep(file), RecipeError),
        (lambda: _first(read.read(rows)), DataError),
    ]
    if kind != "a folder":  # of a model
        readings.append((lambda: check_path(settings(chat_template_path=str(template))), RecipeError))
    began = time.perf_counter()
    for reading, error in readings:
        with pytest.raises(error) as said:
            reading()
        assert "\n" not in said.value.what
    assert time.perf_counter() - began < 3 * SECOND


def _first(rows: Iterator[tuple[str, Any]]) -> None:
    _, row = next(rows)
    if isinstance(row, DataError):
        raise row


@pytest.mark.parametrize("key", ["model_name_or_path", "chat_template_path", "dataset_name", "output_dir"])
def test_a_name_that_no_file_has_is_refused(key: str, tmp_path: Path) -> None:
    """Guards against an OSError's traceback from wherever the name is used first."""
    for name in (LONG, "a/" * 3000, "a\0b"):
        with pytest.raises(RecipeError, match=rf"r\.yaml:1:2.*{key}.*cannot be used"):
            file = tmp_path / "r.yaml"
            file.write_text(json.dumps({key: name}))
            load.load(str(file), [])
    for name in (LONG, "a/" * 3000):
        with pytest.raises(RecipeError, match="longer than"):
            load.load(name, [])


MODEL = ("config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json")


@pytest.mark.parametrize("name", MODEL)
def test_a_model_whose_files_are_none_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    """Guards against a library that waits for a pipe until the job ends."""
    for number, kind in enumerate(("a pipe", "a device", "a link to nothing", "a list", "brackets")):
        folder = tmp_path / str(number)
        shutil.copytree(tiny, folder)
        (folder / name).unlink(missing_ok=True)
        if kind in NO_FILES:
            made(kind, folder / name)
        elif name.removesuffix(".json") in ("config", "tokenizer_config", "model.safetensors.index"):
            (folder / name).write_text("[1]" if kind == "a list" else "[" * 100_000)
        else:
            continue
        with pytest.raises(ModelError, match=f"{name} cannot be used"):
            pretrained.check_source(str(folder))


def test_a_tokenizer_with_one_wrong_bit_is_loaded_or_refused(tiny: Path, tmp_path: Path) -> None:
    """Guards against a traceback: the reader of tokenizer.json raises errors that have no class of their own."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    whole = (folder / "tokenizer.json").read_bytes()
    refused = 0
    for place in random.Random(0).sample(range(len(whole)), 60):
        (folder / "tokenizer.json").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            pretrained.load_tokenizer(str(folder))
        except ModelError as error:
            refused += 1
            assert str(folder) in str(error.what) and error.help
    assert refused > 10


def test_the_commands_say_it(tiny: Path, tmp_path: Path) -> None:
    """Guards the way from the readers to the terminal: exit code 2, one message, before torch is imported."""
    commands: list[tuple[Any, ...]] = [
        ("sft", "--recipe", made("a pipe", tmp_path / "pipe.yaml")),
        ("sft", "--recipe", "lora", "--model_name_or_path", tiny, "--output_dir", tmp_path / "o", "--resume", LONG),
        ("report", tmp_path / LONG),
        ("merge", "--adapter", tmp_path / LONG, "--output_dir", tmp_path / "merged"),
        ("submit", "--sweep", made("a device", tmp_path / "sweep.yaml")),
    ]
    for command in commands:
        done = script(*command, timeout=60)
        assert done.code == 2 and "Traceback" not in done.err, done
        assert done.err.count("✘") == 1, done


# ---- run folders

GONE = object()
MUTATIONS = (None, True, "x", -1.5, 10**400, math.nan, [], [1], {"a": 1}, GONE)
RECIPE = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "max_steps": 4, "use_peft": True, "lora_r": 8,
          "peft_type": "lora", "lr_scheduler_type": "linear", "load_in_4bit": False}  # fmt: skip
MANIFEST = {
    "status": "preempted", "started": "2026-01-01T00:00:00+0000", "progress": {"step": 2, "starts": 1},
    "resumed": [{"step": 2, "from": "r/checkpoint-2"}], "wandb_run_id": "00000000", "git_commit": None,
    "packages": {"torch": "2"}, "slurm": {"job_id": "7", "restart_count": 0}, "recipe": RECIPE,
    "samples": {"before": [{"question": "q", "reference": "r", "answer": "a"}], "after": []},
    "strategy": "single", "world_size": 1, "precision": "fp32", "global_batch_size": 4, "error": "none",
    "parameters": {"all": 10, "trainable": 5}, "plan": {"peak_memory_bytes": 1000},
    "datasets": [{"name": "d.jsonl", "rows": 8, "sha256": "0"}], "final": {"loss": 1.0, "eval_loss": 2.0},
    "totals": {"steps": 4, "tokens": 9, "seconds": 3.5, "tokens_per_second": 2.5, "peak_memory_bytes": [1000]},
}  # fmt: skip
SIDE = {"mean": 1.0, "low": 0.5, "high": 1.5, "rows": 1}
COMPARISON = {
    "command": "c", "notes": ["n"], "questions": ["q"], "references": ["r"],
    "sides": [{"name": name, "answers": ["a"], "loss": 1.0} for name in ("base", "tuned")],
    "metrics": [{"name": "loss", "unit": "share of answers", "sides": [SIDE, SIDE], "tests": [None, None],
                 "winner": "base"}],
    "verdicts": [{"side": "tuned", "verdicts": [{"severity": "good", "name": "better", "what": "w", "evidence": "e",
                                                 "help": "", "figures": {}}]}],
}  # fmt: skip
AUDIT = {"findings": [{"severity": "warning", "name": "n", "what": "w", "where": ["d:1"], "figures": {"a": 1}}]}
ROW = {"step": 1, "epoch": 0.5, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 9.0,
       "peak_memory_bytes": 1000, "eval_loss": 2.0}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def mutated(value: Any, path: tuple[Any, ...], mutation: Any) -> Any:
    if not path:
        return {} if mutation is GONE else mutation
    changed = copy.copy(value)
    if len(path) == 1 and mutation is GONE:
        del changed[path[0]]
    else:
        changed[path[0]] = mutated(value[path[0]], path[1:], mutation)
    return changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "run"
    here.mkdir()
    (here / "run.json").write_text(json.dumps(MANIFEST))
    (here / "metrics.jsonl").write_text("".join(json.dumps(ROW | {"step": step}) + "\n" for step in range(1, 12)))
    (here / "compare.json").write_text(json.dumps(COMPARISON))
    (here / "audit.json").write_text(json.dumps(AUDIT))
    (here / "README.md").write_text("---\nlicense: mit\n---\n")
    return here


def report(folder: Path) -> None:
    logged = runs.read_all([folder])
    page.render_page(logged)
    runs.side_by_side(logged)
    markdown.mini_project_report(logged[0], "x")
    markdown.run_size(logged[0].facts)


def model_card(folder: Path) -> None:
    trained, losses = card.read_training(folder)
    card.front_matter(folder)
    card.render(folder, "base", None, trained, losses, None)


def queue(folder: Path) -> None:
    job.decide_requeue(folder, 1)


def speed(folder: Path) -> None:
    before, sys.argv = sys.argv, ["job", "speed", str(folder)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            job.main()
    finally:
        sys.argv = before


def follow(folder: Path) -> None:
    if manifest.status(folder) not in ("running", "unreadable"):  # else it would follow on
        list(runs.follow(folder))


READERS = (report, model_card, queue, speed, follow)


def only_messages(reader: Callable[[Path], None], folder: Path, what: Any) -> None:
    try:
        reader(folder)
    except StepladderError:
        pass
    except Exception as error:
        raise AssertionError(f"{reader.__name__}: {what}: {error!r}") from error


@pytest.mark.parametrize("name", ["run.json", "compare.json", "audit.json", "metrics.jsonl"])
def test_any_fact_of_another_kind_is_said(name: str, folder: Path) -> None:
    """Guards every command that reads a run folder: each fact that is removed, or of each other kind, by turns."""
    content = {"run.json": MANIFEST, "compare.json": COMPARISON, "audit.json": AUDIT, "metrics.jsonl": ROW}[name]
    rest = (folder / name).read_text().partition("\n")[2] if name == "metrics.jsonl" else ""
    readers = {"run.json": READERS, "metrics.jsonl": (report, model_card, follow)}.get(name, (report,))
    for path in places(content):
        for mutation in MUTATIONS:
            (folder / name).write_text(json.dumps(mutated(content, path, mutation)) + "\n" + rest)
            for reader in readers:
                only_messages(reader, folder, (path, mutation))


def test_a_start_says_what_in_the_manifest_is_wrong(tmp_path: Path, settings: Any) -> None:
    """Guards the start of a run that stands: it goes on, starts anew or is refused, and ends in no traceback."""
    recipe = settings(**RECIPE)
    for number, path in enumerate(places(MANIFEST)):
        for mutation in MUTATIONS:
            here = tmp_path / f"{number}"
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            (here / "run.json").write_text(json.dumps(mutated(MANIFEST, path, mutation)))
            only_messages(lambda here: _start(here, recipe), here, (path, mutation))


def _start(folder: Path, recipe: Any) -> None:
    run = runs_folder.Run(folder, is_writer=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            resume.claim(run, recipe, "auto", False, [])
    finally:
        run._lock.release()


RAW = {
    "empty": b"", "an object": b"{}", "a list": b"[]", "a text": b'"x"', "a number": b"1", "no number": b"NaN",
    "brackets": b"[" * 100_000, "levels": b'{"a":' * 200 + b"1" + b"}" * 200, "bytes": bytes(range(256)),
    "zeros": b"\0" * 1000, "digits": b'{"status": ' + b"9" * 10_000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "compare.json", "audit.json", "README.md"])
def test_any_content_of_a_run_file_is_said(name: str, folder: Path, settings: Any) -> None:
    """Guards against files that are cut, nested or none at all: a pipe is waited for, a folder is no file."""
    for kind, content in RAW.items():
        (folder / name).write_bytes(content)
        for reader in READERS:
            only_messages(reader, folder, kind)
    recipe = settings(**RECIPE)
    for kind in (*NO_FILES, "a gigabyte"):
        files.remove(folder / name)
        made(kind, folder / name)
        for reader in READERS if kind != "a gigabyte" or name != "metrics.jsonl" else ():
            only_messages(reader, folder, kind)
        if name == "metrics.jsonl" and kind in NO_FILES:
            with pytest.raises(StepladderError, match=r"metrics\.jsonl is no file"):
                _start(folder, recipe)


@pytest.mark.parametrize("name", ["checkpoint-08", "checkpoint-2.partial", "a link"])
def test_what_is_no_checkpoint_is_not_resumed_from(name: str, folder: Path, settings: Any) -> None:
    """Guards `--resume` against names that are nearly those of checkpoints, and against links."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "COMPLETE.json").write_text('{"step": 2, "resumable": true, "files": {}}')
    chosen = folder / ("checkpoint-2" if name == "a link" else name)
    chosen.symlink_to(elsewhere) if name == "a link" else shutil.copytree(elsewhere, chosen)
    run = runs_folder.Run(folder, is_writer=True)
    with pytest.raises(StepladderError) as said:
        resume.claim(run, settings(**RECIPE), str(chosen), False, [])
    run._lock.release()
    assert str(chosen) in said.value.what


# ---- a job that was queued again


@pytest.mark.parametrize(
    ("status", "job_id", "changed", "finished"),
    [
        ("finished", "7", {}, True),
        ("finished", "8", {}, False),  # another job's run
        ("finished", "7", {"lora_r": 16}, False),
        ("preempted", "7", {}, False),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_comes_back_after_its_end(status, job_id, changed, finished, rank, folder, settings, monkeypatch):
    """Guards what Slurm queues again, for a node that failed after the run's end, against a failure on any rank."""
    (folder / "run.json").write_text(json.dumps(MANIFEST | {"status": status}))
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = sorted(file.name for file in folder.iterdir())
    run = runs_folder.Run(folder, is_writer=rank == 0)
    if finished:
        with pytest.raises(resume.Finished, match="is finished") as said:
            resume.claim(run, settings(**RECIPE | changed), "auto", True, [])
        assert said.value.exit_code == 0 and said.value.render().startswith("✔")
        assert sorted(file.name for file in folder.iterdir()) == before
    else:
        with contextlib.suppress(StepladderError):
            resume.claim(run, settings(**RECIPE | changed), "auto", False, [])
            assert rank or status == "preempted"
        if rank == 0:
            run._lock.release()


# ---- one reader for all of it


def test_the_reader_of_files(tmp_path: Path) -> None:
    """Guards the reasons, which every message quotes."""
    for kind, reason in {
        "a folder": "folder", "a pipe": "pipe", "a device": "device", "a link to nothing": "a link to 'nowhere'",
        "a link to itself": "symbolic links", "of another encoding": "not UTF-8", "a gigabyte": "holds more than",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            files.read_text(made(kind, tmp_path / kind))
    with pytest.raises(ValueError, match="No such file"):
        files.read_text(tmp_path / "none")
    (tmp_path / "marked").write_bytes("\ufeffa: é\n".encode())
    assert files.read_text(tmp_path / "marked") == "a: é\n"
    assert files.parse_json(f'{{"n": {10**30}}}') == {"n": 1e30}
