"""Stepladder as a package: a wheel, installed into an environment of its own that does not see the clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import LAUNCHER_VARIABLES, ROOT, Done, losses, manifest, metrics
from stepladder import installation
from stepladder.files import cache_folder

SOURCES = ("src", "scripts", "recipes", "accelerate_configs", "ds_configs", "data", "slurm", "starter")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone, built in a copy: setuptools leaves folders where it builds."""
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    (copy / "slurm/site.sh").write_text("export SECRET=1\n")  # a user's own settings must stay at home
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(copy)], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed_run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """A function that runs a shell command in a folder, where `stepladder` and `python` are those of the wheel."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    # The libraries of this environment, as a path alone: its own .pth files, which lead to the clone, are not read.
    libraries = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (site / "libraries.pth").write_text(f"{libraries}\n")

    def run(command: str, cwd: Path, **env: str) -> Done:
        dropped = {*LAUNCHER_VARIABLES, "PYTHONPATH"}
        clean = {key: value for key, value in os.environ.items() if key not in dropped}
        path = f"{venv / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "VIRTUAL_ENV": str(venv), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        words = ["bash", "-c", command]
        return Done(subprocess.run(words, cwd=cwd, env=clean | own | env, capture_output=True, text=True, timeout=300))

    return run


@pytest.fixture(scope="session")
def project(installed_run: Callable[..., Done], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder that `stepladder init` has made, with a tiny model in place of the one that is fetched."""
    above = tmp_path_factory.mktemp("projects")
    done = installed_run("stepladder init 'my project'", above)
    assert done.code == 0, done
    folder = above / "my project"
    shutil.copytree(tiny, folder / "models/smollm2-135m-instruct")
    return folder, done.out


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    """Guards an installation without its recipes, and one with tests, measurements or a user's own settings."""
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("stepladder/shipped/") for name in names if name.startswith("stepladder/shipped/")}
    listed = subprocess.run(["git", "ls-files", *SOURCES[1:]], cwd=ROOT, capture_output=True, text=True).stdout
    here = {line for line in listed.splitlines() if (ROOT / line).is_file()}
    assert here <= shipped, here - shipped
    assert "slurm/site.sh" not in shipped
    code = {f"{file.relative_to(ROOT / 'src')}" for file in (ROOT / "src").rglob("*.py")}
    rest = {name for name in names if not name.startswith("stepladder/shipped/") and ".dist-info/" not in name}
    assert code <= rest
    assert {Path(name).suffix for name in rest - code} == {".yaml", ".jinja", ".css", ".html", ".js"}
    assert not [name for name in names if re.search(r"(^|/)(tests|benchmarks|docs|runs|models)/", name) and
                not name.startswith("stepladder/shipped/recipes/models/")]  # fmt: skip


def test_the_commands_are_listed_and_run_without_the_clone(installed_run: Callable[..., Done], tmp_path: Path) -> None:
    """Guards the entry point: it runs each script of the wheel, by the names that a person types."""
    done = installed_run("stepladder --help && stepladder && python -m stepladder --help", tmp_path)
    assert done.code == 0 and done.out.count("usage: stepladder COMMAND") == 3, done
    for name, first in installation.scripts().items():
        assert f"  {name} " in done.out and first in done.out, name
    done = installed_run("python -c 'import stepladder; print(stepladder.__file__)'", tmp_path)
    assert str(ROOT) not in done.out, done
    done = installed_run("stepladder merge --help; stepladder chek; stepladder --version", tmp_path)
    assert "usage: stepladder merge" in done.out and "\n    stepladder merge --adapter runs/lora" in done.out, done
    assert "scripts/" not in done.out and "did you mean 'check'" in done.err and "stepladder 0" in done.out, done
    done = installed_run("stepladder plan --recipe models/llama-3.1-8b/lora --gpus 8", tmp_path)
    (launch,) = [line for line in done.out.splitlines() if line.startswith("accelerate launch")]
    assert done.code == 0 and " -m stepladder.sft --recipe models/llama-3.1-8b/lora" in launch, done
    assert Path(launch.split()[3]).is_file() and "shipped/accelerate_configs" in launch


def test_a_mistake_is_one_message(installed_run: Callable[..., Done], tmp_path: Path) -> None:
    """Guards exit codes through the entry point: 2 and no traceback, and help that can be typed here."""
    done = installed_run("stepladder sft --recipe lora --max_steps 1", tmp_path)
    assert done.code == 2 and "Traceback" not in done.err, done
    assert "help: stepladder fetch_model" in done.err and f"looked in {tmp_path}" in done.err, done
    done = installed_run("stepladder submit --recipe lora --model_name_or_path a/b --dry_run", tmp_path)
    assert done.code == 2 and "stepladder init DIR" in done.err, done
    done = installed_run("mkdir gone && cd gone && rmdir ../gone && stepladder check --recipe lora", tmp_path)
    assert done.code == 2 and "the current folder is not there any more" in done.err, done
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.txt").touch()
    done = installed_run("stepladder init full", tmp_path)
    assert done.code == 2 and "it holds keep.txt" in done.err, done
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["keep.txt"]


def test_the_commands_that_init_prints(project: Any, installed_run: Callable[..., Done]) -> None:
    """Guards the first quarter of an hour: what is printed runs as it is printed, and so does the README's merge."""
    folder, printed = project
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert commands[0] == "cd 'my project'" and len(commands) >= 5
    readme = re.findall(r"^    (stepladder [^#\n]*?) *(?:#.*)?$", (folder / "README.md").read_text(), re.MULTILINE)
    assert [line for line in readme if line in commands] == commands[1:]
    more = [line for line in readme if line not in commands and "submit" not in line]
    script = " && ".join([*commands, *more, "stepladder report runs/mine --json"])
    done = installed_run(f"set -e; {script}", folder.parent)
    assert done.code == 0, done
    assert "it is there already" in done.out  # fetch_model
    facts = manifest(folder / "runs/mine")
    assert facts["status"] == "finished" and facts["recipe"]["dataset_name"] == "data/train.jsonl"
    assert metrics(folder / "runs/mine")[-1]["eval_loss"] > 0
    assert json.loads((folder / "runs/mine/compare.json").read_text())["command"] == (
        "stepladder compare --tuned runs/mine"
    )
    assert (folder / "merged/mine/model.safetensors").is_file()
    page = (folder / "runs/mine/report.html").read_text()
    assert "stepladder report" in page and "scripts/" not in page
    assert "scripts/" not in (folder / "runs/mine/README.md").read_text() + done.out


def test_slurm_jobs_of_the_folder(project: Any, installed_run: Callable[..., Done]) -> None:
    """Guards `stepladder submit`: its templates run the installed package, in the environment that it lies in."""
    folder, _ = project
    done = installed_run("stepladder submit --recipe mine --dry_run", folder)
    assert done.code == 0 and "slurm/sft.sbatch --recipe mine" in done.out, done
    templates = "".join(file.read_text() for file in (folder / "slurm").glob("*.s*"))
    assert not re.search(r"scripts/\w", templates)
    asked = 'SLURM_SUBMIT_DIR=$PWD; source slurm/environment.sh; "${inside[@]}" python -m stepladder.cluster.job '
    done = installed_run(f"set -euo pipefail; VIRTUAL_ENV= PATH=/usr/bin:/bin; {asked} folder --recipe mine", folder)
    assert done.code == 0 and done.out == "runs/mine\n", done


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.proof)])
def test_two_processes_by_the_module(
    strategy: str, installed_run: Callable[..., Done], tiny: Path, tmp_path: Path
) -> None:
    """Guards `accelerate launch -m stepladder.sft` from an empty folder: recipe, data and DeepSpeed's file are found.

    A folder of the user's with a library's name must not take its place, as Python's -m would have it.
    """
    (tmp_path / "wandb").mkdir()
    (tmp_path / "peft.py").write_text("raise SystemExit('the folder of the user was imported')\n")
    shipped = '$(python -c "from stepladder import installation as i; print(i.ROOT)")'
    launch = f'python -m accelerate.commands.launch --config_file "{shipped}/accelerate_configs/{strategy}.yaml"'
    launch += " --num_processes 2 --main_process_port 0"
    keys = f"--recipe lora --model_name_or_path {tiny} --max_steps 2 --eval_strategy no --save_strategy no"
    # DeepSpeed's op is compiled once for a folder, and by default there is one for each environment
    built = str(cache_folder() / "torch_extensions" / "package_test")
    done = installed_run(f"{launch} -m stepladder.sft {keys}", tmp_path, TORCH_EXTENSIONS_DIR=built)
    assert done.code == 0, done
    facts = manifest(tmp_path / "runs/lora")
    assert (facts["world_size"], facts["strategy"]) == (2, strategy) and len(losses(tmp_path / "runs/lora")) == 2


def test_uv_takes_the_versions_of_constraints_txt() -> None:
    """Guards `uv sync`, which reads no constraints.txt; and the file of package indexes that it writes."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [line for line in lines if line and not line.startswith("#")]
    assert project["tool"]["uv"]["constraint-dependencies"] == pins
    assert "/uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_page_shows_what_init_prints(project: Any) -> None:
    """Guards docs/outside_the_clone.md against a command that init does not print any more."""
    shown = project[1].replace("'my project'", "my_project").replace("my project", "my_project")
    assert shown in (ROOT / "docs/outside_the_clone.md").read_text()
