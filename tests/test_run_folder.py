"""What lies in a run folder, and what a start makes of it: only what the run wrote is read, and little is removed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from in_turn import cut

from conftest import ROOT, losses, manifest, metrics, run

pytestmark = [pytest.mark.proof, pytest.mark.alone]
STEPS, CUT = 4, 2


class Starts:
    """Starts of sft.py, all in one process, on folders that are prepared before it."""

    def __init__(self, folder: Path, recipe: Path):
        self.folder, self.recipe = folder, recipe
        self.commands: list[Any] = []
        self.names: list[str] = []
        self.codes: dict[str, int] = {}

    def add(self, name: str, *words: Any, output_dir: Path | None = None, **env: str | None) -> None:
        """One start, with these words and variables, into the folder `name` unless another is given."""
        self.names.append(name)
        words = ("--recipe", self.recipe, "--output_dir", output_dir or self.folder / name, *words)
        self.commands += [{"env": env}, list(map(str, words)), {"env": dict.fromkeys(env)}]

    def run(self) -> None:
        file = self.folder / "commands.json"
        file.write_text(json.dumps(self.commands))
        done = run(sys.executable, ROOT / "tests/in_turn.py", file)
        assert done.code == 0, done
        self.out = done.out
        self.codes = dict(zip(self.names, json.loads(Path(f"{file}.codes").read_text()), strict=True))


@pytest.fixture(scope="module")
def starts(tiny, learnable, tmp_path_factory) -> Starts:
    """A finished run `whole`, and all starts of this file on copies of it."""
    folder = tmp_path_factory.mktemp("folders")
    recipe = folder / "recipe.json"
    keys = {
        "model_name_or_path": str(tiny), "dataset_name": str(learnable), "max_steps": STEPS, "global_batch_size": 4,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "bf16": False,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "max_length": 192,
    }  # fmt: skip
    recipe.write_text(json.dumps(keys))
    first = Starts(folder, recipe)
    first.add("whole")
    first.run()
    rest = Starts(folder, recipe)
    for scenario in SCENARIOS:
        scenario(rest)
    rest.run()
    return rest


def killed(starts: Starts, name: str, step: int = CUT) -> Path:
    """A copy of the run as a kill after this step leaves it."""
    cut(str(starts.folder / "whole"), str(starts.folder / name), step)
    return starts.folder / name


# ---- files beside a checkpoint


def strays(starts: Starts) -> None:
    checkpoint = killed(starts, "strays") / f"checkpoint-{CUT}"
    for kind in ("model", "optimizer"):
        for stray in ("0-0_old", "0-0.sync-conflict-20260101-101010-ABC", "1-0"):
            shutil.copy(
                starts.folder / f"whole/checkpoint-{STEPS}/{kind}-0-0.safetensors",
                checkpoint / f"{kind}-{stray}.safetensors",
            )
    shutil.copy(checkpoint / "rng-0.safetensors", checkpoint / "rng-0_old.safetensors")
    starts.add("strays")


def test_only_listed_files_are_read(starts) -> None:
    """Guards the weights of a checkpoint against copies beside it, such as an editor's or a synchronizer's."""
    assert starts.codes["strays"] == 0
    assert losses(starts.folder / "strays") == losses(starts.folder / "whole")


# ---- a job that is queued again

REQUEUED = {"resume": ("--resume", "checkpoint-1"), "overwrite": ("--overwrite",), "never": ("--resume", "never")}


def requeued(starts: Starts) -> None:
    for name, words in REQUEUED.items():
        for job in ("7", "8"):
            folder = killed(starts, f"{name}-{job}", 3)
            facts = manifest(folder) | {"slurm": {"job_id": "7", "restart_count": 0}}
            (folder / "run.json").write_text(json.dumps(facts))
            words_here = (str(folder / word) if word.startswith("checkpoint") else word for word in words)
            starts.add(f"{name}-{job}", *words_here, SLURM_JOB_ID=job, SLURM_RESTART_COUNT="1")


@pytest.mark.parametrize("name", REQUEUED)
def test_a_requeued_job_resumes_its_run(name, starts) -> None:
    """Guards the work of a job's first start against the options of its command, which Slurm gives again."""
    assert starts.codes[f"{name}-7"] == 0, starts.out
    assert manifest(starts.folder / f"{name}-7")["resumed"][-1]["step"] == 3
    assert losses(starts.folder / f"{name}-7") == losses(starts.folder / "whole")
    other = manifest(starts.folder / f"{name}-8")
    if name == "never":
        assert starts.codes[f"{name}-8"] == 2 and other["status"] == "running"
    else:  # the folder's run is not this job's
        assert [entry["step"] for entry in other["resumed"]] == ([1] if name == "resume" else [])
        assert other["slurm"]["job_id"] == "8"


# ---- --overwrite


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


REFUSED = {
    "a base that is cut": ("--model_name_or_path", "CUT_BASE"),
    "a row that trains nothing": ("--max_length", "8"),
    "a callback that is none, after the run has begun": ("--callback", "README.md"),
    "its own model": ("--model_name_or_path", "HERE"),
    "its own model, by a link": ("--model_name_or_path", "LINK"),
    "its own rows": ("--dataset_name", "HERE/rows.jsonl"),
    "its own rows, in a mixture": ("--datasets", '[{"path": "HERE/rows.jsonl"}]'),
}


def replaced(starts: Starts) -> None:
    base = starts.folder / "base"
    shutil.copytree(json.loads(starts.recipe.read_text())["model_name_or_path"], base)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:9000])
    for name, words in REFUSED.items():
        here = starts.folder / name
        shutil.copytree(starts.folder / "whole", here)
        shutil.copy(json.loads(starts.recipe.read_text())["dataset_name"], here / "rows.jsonl")
        (starts.folder / f"link to {name}").symlink_to(here)
        for word, path in {"CUT_BASE": base, "LINK": starts.folder / f"link to {name}", "HERE": here}.items():
            words = tuple(text.replace(word, str(path)) for text in words)
        starts.add(name, "--overwrite", *words)
    elsewhere = starts.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years of work")
    shutil.copytree(starts.folder / "whole", starts.folder / "replaced")
    (starts.folder / "replaced/link").symlink_to(elsewhere)
    starts.add("replaced", "--overwrite", "--max_steps", "1")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_overwrite_leaves_the_run(name, starts) -> None:
    """Guards the run that stands, and the base or rows in its folder, against a start that is refused."""
    assert starts.codes[name] == 2, starts.out
    left = tree(starts.folder / name)
    assert left.pop("rows.jsonl")
    assert left == tree(starts.folder / "whole")
    if name.startswith("its own"):
        assert f"{starts.folder / name}, whose run --overwrite replaces" in starts.out


def test_an_overwritten_run_goes_and_links_are_not_followed(starts) -> None:
    assert starts.codes["replaced"] == 0, starts.out
    found = {path.name for path in (starts.folder / "replaced").iterdir()}
    assert found == ({path.name for path in (starts.folder / "whole").iterdir()}) - {
        f"checkpoint-{step}" for step in range(2, STEPS + 1)
    }
    assert [row["step"] for row in metrics(starts.folder / "replaced")] == [1]
    assert (starts.folder / "elsewhere/thesis.tex").is_file()


# ---- run.json as accidents and strangers leave it

LOST = {
    "empty": "", "an empty object": "{}", "a list": "[]", "nested": "[" * 100_000,
    "deep": '{"a": ' * 200 + "1" + "}" * 200,
}  # fmt: skip
DAMAGED: dict[str, Any] = {
    "a status of another kind": {"status": {}}, "a recipe of another kind": {"recipe": [1]},
    "progress of another kind": {"progress": [1]}, "many starts": {"progress": {"step": 2, "starts": 10**400}},
    "no progress": {"progress": None},
    "resumed of another kind": {"resumed": {"a": 1}}, "no data": {"datasets": []},
    "data of another kind": {"datasets": "x"},
    "a batch that is none": {"global_batch_size": None},
}  # fmt: skip


def damaged(starts: Starts) -> None:
    for name, content in (LOST | DAMAGED).items():
        folder = killed(starts, name)
        text = content if isinstance(content, str) else json.dumps(manifest(folder) | content)
        (folder / "run.json").write_text(text)
        starts.add(name)
    (killed(starts, "metrics") / "metrics.jsonl").open("a").write(
        "[" * 100_000 + '\n{"step": 1' + "0" * 400 + "}\n[]\n"
    )
    starts.add("metrics")


@pytest.mark.parametrize("name", LOST)
def test_a_lost_manifest_is_rebuilt(name, starts) -> None:
    """Guards a run.json that says nothing any more: the newest checkpoint holds its content, and the run goes on."""
    assert starts.codes[name] == 0 and f"{starts.folder / name}/run.json is lost or damaged" in starts.out
    assert losses(starts.folder / name)[CUT:] == losses(starts.folder / "whole")[CUT:]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_manifest_is_refused(name, starts) -> None:
    """Guards against a traceback, and against a start from the beginning over checkpoints that are whole."""
    assert starts.codes[name] == 2, starts.out
    said = "with another global_batch_size" if "none" in name else f"{starts.folder / name}/run.json cannot be used"
    assert said in starts.out
    assert (starts.folder / name / f"checkpoint-{CUT}/COMPLETE.json").is_file()


def test_damaged_metrics_are_left_out(starts) -> None:
    assert starts.codes["metrics"] == 0 and "has 3 damaged lines: left out" in starts.out
    assert losses(starts.folder / "metrics") == losses(starts.folder / "whole")


SCENARIOS = [strays, requeued, replaced, damaged]
