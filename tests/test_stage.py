"""What scripts/stage.py fetches is all that a run needs where no network is, and nothing less is taken for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, losses, run, script
from hub_server import Hub
from same_curve import recipe_keys, write_rows
from stepladder.files import hash_file, open_lock

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
CARD = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: rows.jsonl}\n"
CARD += "  - {split: test, path: held_out.jsonl}\n"


@dataclass
class Site:
    """A hub, a recipe that names its repositories, and the stage that was filled from it and then copied."""

    hub: Hub
    recipe: Path
    folder: Path
    stage: Path

    def fill(self, *words: object, to: Path, **env: str):
        home = str(self.folder / "home")
        return script("stage", "--recipe", self.recipe, "--to", to, *words,
                      **{"HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": home, **env})  # fmt: skip


@pytest.fixture(scope="module")
def site(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("stage")
    rows = folder / "rows"
    rows.mkdir()
    write_rows(rows / "rows.jsonl")
    shutil.copy(rows / "rows.jsonl", rows / "held_out.jsonl")
    (rows / "README.md").write_text(f"---\n{CARD}---\nRows.\n")
    keys = recipe_keys("full", Path("org/tiny"), Path("org/rows"))
    keys |= {"max_steps": 3, "use_cpu": True, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"}
    keys.pop("eval_dataset_name", None)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    with Hub() as hub:
        hub.repositories = {"model org/tiny": tiny, "dataset org/rows": rows}
        here = Site(hub, recipe, folder, folder / "elsewhere")
        done = here.fill("--seed", 4, to=folder / "stage")
        assert done.code == 0 and "✔ dataset org/rows@main" in done.out, done
        assert f"check.py --recipe {recipe} --seed 4\n" in done.out, "the keys name what was fetched"
        shutil.copytree(folder / "stage", here.stage, symlinks=True)
        yield here


def no_network(*words: object, **env: str):
    """A command in a network namespace of its own, which has no route, nor its own loopback."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return run("unshare", *user, "--net", sys.executable, *words, **env)


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_copied_stage_trains_without_a_network_as_the_files_do(site: Site, tiny: Path) -> None:
    """Guards against a stage that holds links, is written by its readers, or lacks what a library asks for at the
    start. The curve is that of the local files, which no stage was in."""
    assert not [path for path in site.stage.rglob("*") if path.is_symlink()]
    before = state_of(site.stage)
    done = no_network("scripts/sft.py", "--recipe", site.recipe, "--output_dir", site.folder / "staged",
                      STEPLADDER_STAGE=str(site.stage), HF_HOME=str(site.folder / "no_home"))  # fmt: skip
    assert done.code == 0, done
    assert state_of(site.stage) == before
    words = ("--model_name_or_path", tiny, "--dataset_name", site.folder / "rows")
    local = script("sft", "--recipe", site.recipe, "--output_dir", site.folder / "local", *words)
    assert local.code == 0, local
    assert losses(site.folder / "staged") == losses(site.folder / "local")


def test_a_data_set_that_was_downloaded_is_found_without_a_network(site: Site) -> None:
    """Guards docs/slurm.md's `hf download --repo-type dataset`: `datasets` does not look into the hub's cache."""
    home = str(site.folder / "downloads")
    download = "from huggingface_hub import snapshot_download as f; f('org/rows', repo_type='dataset')"
    assert run(sys.executable, "-c", download, HF_ENDPOINT=site.hub.url, HF_HUB_OFFLINE="0", HF_HOME=home).code == 0
    read = "from stepladder.data import mixture; print(len(mixture.from_name('org/rows', split='test')))"
    done = no_network("-c", read, HF_HOME=home, PYTHONPATH=str(ROOT / "src"))
    count = len((site.folder / "rows/held_out.jsonl").read_text().splitlines())
    assert done.code == 0 and done.out.split()[-1] == str(count), done


def test_a_second_call_adds_what_is_missing(site: Site) -> None:
    """Guards a stage of several recipes: nothing is fetched twice, an adapter brings its base, a damaged file is
    fetched again, and what is there stays as it was even where the hub has moved on."""
    adapter = site.folder / "adapter"
    adapter.mkdir()
    config = ADAPTER | {"base_model_name_or_path": "org/tiny2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 10)
    shutil.copytree(site.hub.repositories["model org/tiny"], site.folder / "tiny2")
    site.hub.repositories |= {"model org/adapter": adapter, "model org/tiny2": site.folder / "tiny2"}
    stage = site.folder / "stage"
    (site.folder / "rows/README.md").write_text(f"---\n{CARD}---\nMoved on.\n")
    commit = json.loads((stage / "stage.json").read_text())["repositories"]["dataset org/rows@main"]["commit"]
    site.hub.asked.clear()
    done = site.fill("--model_name_or_path", "org/adapter", to=stage)
    assert done.code == 0, done
    assert "✔ model org/adapter@main" in done.out and "✔ model org/tiny2@main" in done.out, done
    assert f"dataset org/rows@main at {commit[:12]}" in done.out and "there already" in done.out, done
    assert not [path for path in site.hub.asked if "org/rows" in path or "org/tiny/" in path]
    weights = next(stage.rglob("models--org--tiny/**/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert site.fill(to=stage).code == 0
    assert hash_file(weights) == hash_file(site.hub.repositories["model org/tiny"] / "model.safetensors")


def test_a_killed_call_leaves_no_half_of_a_model(site: Site) -> None:
    """Guards against a half-fetched model that jobs would take for a whole one: they are refused by its name before
    ranks start, and the same command goes on."""
    stage = site.folder / "killed"
    site.hub.pause = 0.5
    env = {"HF_ENDPOINT": site.hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(site.folder / "home")}
    words = [sys.executable, "scripts/stage.py", "--recipe", str(site.recipe), "--to", str(stage)]
    half = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(stage.rglob("*.incomplete")):
        assert time.monotonic() < end and half.poll() is None
        time.sleep(0.05)
    half.send_signal(signal.SIGKILL)
    half.wait()
    site.hub.pause = 0.0
    job = (sys.executable, "-m", "stepladder.cluster.job", "folder", "--recipe", site.recipe)
    refused = run(*job, STEPLADDER_STAGE=str(stage), PYTHONPATH=str(ROOT / "src"))
    assert refused.code == 2 and "lacks model org/tiny@main" in refused.err and not refused.out, refused
    assert site.fill(to=stage).code == 0
    assert run(*job, STEPLADDER_STAGE=str(stage), PYTHONPATH=str(ROOT / "src")).code == 0


CASES = """
import json, os, sys
from pathlib import Path
from stepladder import errors
from stepladder.cluster import staging
from stepladder.recipe import load
for words, to, env in json.load(open(sys.argv[2])):
    os.environ.update(env)
    try:
        staging.fill(load.load(sys.argv[1], words), Path(to), False)
        print("filled")
    except errors.StepladderError as error:
        print(error.render().replace("\\n", " "))
    for name in env:
        del os.environ[name]
"""


def test_what_cannot_be_staged_is_named(site: Site, tmp_path: Path) -> None:
    """Guards the messages, and against a stage that is made all the same."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("no folder")
    site.hub.repositories["model org/gated"] = site.hub.repositories["model org/tiny"]
    site.hub.gated.add("org/gated")
    model, fresh = "--model_name_or_path", str(tmp_path / "fresh")
    address = ["--dataset_name", "null", "--datasets", "[{path: json, data_files: 'https://example.org/x.jsonl'}]"]
    kernel = ["--attn_implementation", "kernels-community/flash-attn2"]
    cases: list[tuple[list[str], str, dict[str, str], str]] = [
        ([model, "org/gated"], fresh, {}, "ask for access on"),
        ([model, "org/none"], fresh, {}, "could not be fetched"),
        (["--model_revision", "v9"], fresh, {}, "model_revision: a branch"),
        (kernel, fresh, {}, "kernels-community/flash-attn2 comes from the hub"),
        (address, fresh, {}, "is read from an address"),
        ([], str(ROOT / "stage"), {}, "lies in this folder"),
        ([], str(tmp_path / "mine"), {}, "holds other files"),
        ([], str(tmp_path / "file"), {}, "cannot be written"),
        ([], fresh, {"STEPLADDER_STAGE": "/x"}, "unset STEPLADDER_STAGE"),
    ]
    (tmp_path / "cases.json").write_text(json.dumps([case[:3] for case in cases]))
    done = run(sys.executable, "-c", CASES, site.recipe, tmp_path / "cases.json", HF_ENDPOINT=site.hub.url,
               HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT / "src"))  # fmt: skip
    said = [line for line in done.out.splitlines() if line.startswith(("✘", "filled"))]
    assert len(said) == len(cases), done
    for line, (*_, wanted) in zip(said, cases, strict=True):
        assert wanted in line, line
    assert not (ROOT / "stage").exists() and (tmp_path / "mine/notes.txt").read_text() == "mine"
    away = site.fill(to=tmp_path / "away", HF_ENDPOINT="http://127.0.0.1:9")
    assert away.code == 2 and "reaches http://127.0.0.1:9" in away.err and "Traceback" not in away.err, away
    with open_lock(site.folder / "stage/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = site.fill(to=site.folder / "stage")
    assert busy.code == 2 and "another process fills" in busy.err, busy
    full = site.fill(to=tmp_path / "full", PYTHONPATH=f"{small_disk(tmp_path)}:{ROOT}/src")
    assert full.code == 2 and "has 98 KiB free" in full.err and "Traceback" not in full.err, full
    away = site.fill("--wheels", to=site.folder / "stage", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert away.code == 2 and "wheels could not be fetched" in away.err and "Traceback" not in away.err, away
    assert not list((site.folder / "stage").glob("*wheels*"))


def small_disk(folder: Path) -> Path:
    """A folder for PYTHONPATH by which a process believes that each disk has 100,000 bytes left."""
    (folder / "sitecustomize.py").write_text(
        "import shutil\nshutil.disk_usage = lambda path: type('Usage', (), {'total': 10**6, 'free': 10**5})()\n"
    )
    return folder


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("absent", "is no stage"),
        ("damaged", "cannot be used"),
        ("outside", "cannot be used"),
        ("other id", "lacks dataset org/rows@main"),
        ("cut short", "instead of"),
        ("gone", "No such file"),
    ],
)
def test_a_stage_that_lacks_something_is_refused(fault: str, said: str, site: Site, tmp_path: Path) -> None:
    """Guards a copy that broke off, and a stage of another recipe: named before anything is loaded."""
    from stepladder.cluster import staging
    from stepladder.errors import LaunchError
    from stepladder.recipe import load

    stage = tmp_path / "stage"
    shutil.copytree(site.stage, stage)
    content = json.loads((stage / "stage.json").read_text())
    if fault == "absent":
        (stage / "stage.json").unlink()
    elif fault == "damaged":
        (stage / "stage.json").write_text('{"repositories": {"model org/tiny@main": 4}}')
    elif fault == "outside":  # stage.py removes a file of another size before it is fetched again
        content["repositories"]["model org/tiny@main"]["files"]["hub/../../kept.txt"] = 1
        (stage / "stage.json").write_text(json.dumps(content))
    elif fault == "other id":
        del content["repositories"]["dataset org/rows@main"]
        (stage / "stage.json").write_text(json.dumps(content))
    else:
        weights = next(stage.rglob("model.safetensors"))
        weights.unlink() if fault == "gone" else weights.write_bytes(b"x")
    os.environ["STEPLADDER_STAGE"] = str(stage)
    with pytest.raises(LaunchError, match=said):
        staging.check_stage(load.load(str(site.recipe), []))
