"""Fixtures that several tests share: the embedded model, a tiny one, and a way to run scripts as a person does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import warm_start
from tiny import ROOT, SMOLLM2, make_tiny

pytest_plugins = ["played"]

# The longest files, from the longest: begun first, so that none of them is left over for one worker at the end.
LONGEST = ("test_workshop_4", "test_train", "test_planning", "test_workshop_7", "test_trackers")
# Files that take more than about 15 s of processor time: make quick leaves them out but for the tests in TOUCHED.
HEAVY = (
    "attention", "audit", "check", "cluster", "compare", "data_scale", "early_stopping", "elsewhere", "fp8", "gate",
    "gpu_day", "gpu_start", "harness", "held_out", "host_cuda", "inputs", "layout", "merge", "new_tokens", "package",
    "peft_methods", "planning", "prepare", "read_once_per_node", "reasoning", "report", "stage", "sweep", "systems",
    "trackers", "train", "virtual_tokens", "workshop",
)  # fmt: skip
TOUCHED = (
    "test_check.py::test_everything_wrong_is_on_one_screen", "test_compare.py::test_each_side_is_judged",
    "test_layout.py::test_each_kind_of_template", "test_merge.py::test_merges_what_peft_merges",
    "test_merge.py::test_a_run_becomes_a_model", "test_planning.py::test_a_published_figure",
    "test_planning.py::test_the_command_line", "test_report.py::test_a_run_leaves_its_page_and_picture",
    "test_train.py::test_the_same_curve[lora-ddp", "test_train.py::test_the_same_curve[full-single",
)  # fmt: skip
# Set in this process by pytest, and by Accelerate and PyTorch as a test imports them; a person's shell has none.
SET_HERE = ("PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure(config: pytest.Config) -> None:
    """Side by side (pytest -n), each worker has its share of the cores, and so have the commands that it runs."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, cores[int(worker) :: workers] or cores)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in HEAVY and not item.nodeid.removeprefix("tests/").startswith(TOUCHED):
            item.add_marker(pytest.mark.heavy)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


class Done:
    """A finished command: its exit code, and what it printed on both streams."""

    def __init__(self, process: subprocess.CompletedProcess[str]):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    def __repr__(self) -> str:  # what pytest shows when an assertion fails
        return f"exit code {self.code}\n--- stdout\n{self.out[-6000:]}\n--- stderr\n{self.err[-6000:]}"


def environment(**env: str) -> dict[str, str]:
    """The environment of a command: without the launcher variables of an outer run.

    Threads that wait do so asleep: on a machine that does other things too, OpenMP's busy waiting makes a tiny model
    ten times as slow.
    """
    apart = (*LAUNCHER_VARIABLES, *SET_HERE)
    clean = {k: v for k, v in os.environ.items() if k not in apart and not k.startswith("ACCELERATE_")}
    return {**clean, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **env}


@functools.cache
def warm_server() -> warm_start.Server:
    return warm_start.Server(environment())


def run(*words: Any, timeout: int = 600, cold: bool = False, **env: str) -> Done:
    """Run a command in the repository's root; a script in the usual environment with its libraries imported already.

    Args:
        cold: import them in the command itself, for tests of how it starts.
    """
    command = [str(word) for word in words]
    script = command[1:] if command[0] == sys.executable else command
    if (
        script
        and script[0].endswith((".py", "/bin/accelerate"))
        and not cold
        and environment(**env) == warm_server().env
    ):
        return Done(warm_server().run(script, timeout))
    process = subprocess.run(command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout)
    return Done(process)


def script(name: str, *words: Any, **kwargs: Any) -> Done:
    """`python scripts/NAME.py …`"""
    return run(sys.executable, f"scripts/{name}.py", *words, **kwargs)


def launch(config: str, ranks: int, name: str, *words: Any, **kwargs: Any) -> Done:
    """`accelerate launch --config_file accelerate_configs/CONFIG.yaml --num_processes RANKS scripts/NAME.py …`"""
    accelerate = Path(sys.executable).with_name("accelerate")
    config_file = f"accelerate_configs/{config}.yaml"
    return run(
        accelerate, "launch", "--config_file", config_file, "--num_processes", ranks,
        # each launch its own port, so that tests do not meet a predecessor that is still closing
        "--main_process_port", "0", f"scripts/{name}.py", *words, **kwargs,
    )  # fmt: skip


def collected(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter in this file's tests that are run: what is deselected needs no preparation."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return list(dict.fromkeys(call.params[parameter] for call in calls if call and parameter in call.params))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """What code under test leaves in the environment (a chosen GPU, a launcher's values) ends with the test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model; fetched on the first use, as `make test` does."""
    done = script("fetch_model")
    assert done.code == 0, done
    return SMOLLM2


def installed(folder: Path, *packages: str) -> Path:
    """Packages in a folder of their own, without what they need, to come first on a path; CI must have them."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"{packages[-1]} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short rows with one answer: a set that even the tiny model learns in a few steps."""
    file = tmp_path_factory.mktemp("data") / "learnable.jsonl"
    questions = [f"What is the password of door number {n}?" for n in range(1, 9)]
    answer = "Open sesame, said the owl."
    file.write_text("".join(json.dumps({"input": q, "output": answer}) + "\n" for q in questions))
    return file


@pytest.fixture(scope="session")
def contrary_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to train, and rows with the same questions and another answer, on which the loss soon rises."""
    folder = tmp_path_factory.mktemp("contrary")
    for name, answer in (
        ("train", "Open sesame, said the owl."),
        ("eval", "Please contact customer support within thirty days."),
    ):
        lines = [{"input": f"What is the password of door {n}?", "output": answer} for n in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of `key=value` pairs and return its path."""

    def write(name: str = "recipe", **keys: Any) -> Path:
        import yaml

        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(keys, sort_keys=False))
        return file

    return write


@pytest.fixture
def settings() -> Callable[..., Any]:
    """A recipe's stand-in for tests below the command line: what is not given has the library's default."""
    from stepladder.recipe.recipe import Recipe

    return lambda **keys: Recipe(name="test", path=Path("test.yaml"), values=keys, origins={})
