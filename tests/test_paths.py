"""A relative path counts from the current folder, then from what ships; commands are spelled for that folder."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from stepladder import flags, installation
from stepladder.cluster import sweep
from stepladder.data import audit, mixture, templates
from stepladder.errors import StepladderError
from stepladder.evaluation import behaviours, harness, metrics, questions
from stepladder.model import start
from stepladder.recipe import convert, load
from stepladder.recipe.recipe import Recipe
from stepladder.training.launch import launcher

ROWS = "data/techco_eval.jsonl"


def recipe(**keys: Any) -> Recipe:
    return Recipe(name="test", path=Path("test.yaml"), values={"eval_strategy": "no", **keys}, origins={})


def rows(**keys: Any) -> Any:
    return [list(found.examples) for found in mixture.load(recipe(**keys)) if found]


def child(name: str) -> Any:
    Path("child.yaml").write_text(f"extends: {name}\n")
    return load.load("child.yaml", []).values


def deepspeed(name: str) -> str:
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": name}
    strategy = launcher.read_launch().strategy
    assert Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).is_file(), "which Accelerate opens"
    return strategy


# What reads a path, and a path that ships (None where nothing of its kind does). The keys are those of a recipe, and
# the other places that a person writes a path in.
Read = Callable[[str], Any]
READERS: dict[str, tuple[Read, str | None]] = {
    "extends": (child, "workshop/steps60"),
    "dataset_name": (lambda name: rows(dataset_name=name), ROWS),
    "eval_dataset_name": (lambda name: rows(dataset_name=ROWS, eval_dataset_name=name), "data/medical_eval.jsonl"),
    "datasets.path": (lambda name: rows(datasets=[{"path": name}]), ROWS),
    "datasets.data_files": (lambda name: rows(datasets=[{"path": "json", "data_files": name}]), ROWS),
    "datasets.data_dir": (
        lambda name: rows(datasets=[{"path": "json", "data_dir": name, "data_files": "qa_eval.jsonl"}]),
        "data/workshop",
    ),
    "model_name_or_path": (lambda name: start.check_source(name), None),
    "chat_template_path": (lambda name: templates.check_path(recipe(chat_template_path=name)), None),
    "--recipe": (lambda name: load.load(name, []).values, "models/qwen3-8b/lora"),
    "--recipe, a path": (lambda name: load.load(name, []).values, "recipes/models/qwen3-8b/lora.yaml"),
    "--strategy": (lambda name: launcher.find_strategy(name, 1, 2), "zero3"),
    "deepspeed_config_file": (deepspeed, "ds_configs/zero3.json"),
    "--sweep": (lambda name: sweep.read_sweep(Path(name)).runs, "slurm/sweeps/lora_rank.yaml"),
    "--rubric": (lambda name: [rule.name for rule in metrics.read_rubric(Path(name))], "data/techco_rubric.yaml"),
    "--prompts": (lambda name: [q.messages for q in questions.read_prompts(Path(name))], ROWS),
    "--data": (lambda name: len(audit.audit_source(name, audit.Limits()).train), ROWS),
    "--tasks": (lambda name: [harness.is_data(name), list(mixture.from_name(name).examples)], ROWS),
    "--behaviours": (lambda name: len(behaviours.read(Path(name))), "data/behaviours.jsonl"),
}
WRITTEN = {"output_dir", "run_name"}  # made where the command runs; nothing is read there


def test_no_key_with_a_path_is_left_out() -> None:
    """Guards a new key that holds a path: it is resolved as the others are, and tried here."""
    assert (
        convert.PATHS | {"extends"}
        == {name for name in READERS if not name.startswith("--")} - {"deepspeed_config_file"} | WRITTEN
    )


@pytest.mark.parametrize("key", sorted(convert.PATHS))
def test_a_home_is_what_a_shell_makes_of_it(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `output_dir: ~/runs` and `--output_dir=~/runs`, which no shell expands: a folder named ~ was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    block, _, inner = key.rpartition(".")
    line = f"{block}: [{{path: a.jsonl, {inner}: ~/a}}]" if inner != "path" and block else f"{key}: ~/a"
    line = "datasets: [{path: ~/a}]" if key == "datasets.path" else line
    more = {"eval_dataset_name": "eval_strategy: epoch", "run_name": "report_to: wandb"}.get(key, "seed: 1")
    Path("mine.yaml").write_text(f"{line}\n{more}\n")
    assert f"'{tmp_path}/home/a'" in str(load.load("mine.yaml", []).values)
    assert flags.path("~/a") == tmp_path / "home/a" and installation.locate("~/a") == tmp_path / "home/a"


@pytest.mark.parametrize("name", [name for name, (_, shipped) in READERS.items() if shipped])
def test_what_ships_is_the_same_in_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards runs outside the clone: recipes, data and configurations lay at the root of the clone alone."""
    read, shipped = READERS[name]
    assert shipped
    clone = tmp_path / "clone"  # a folder with the same names in it
    clone.mkdir()
    for folder in installation.FOLDERS:
        (clone / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(clone)
    expected = read(shipped)
    assert expected
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read(shipped) == expected


@pytest.mark.parametrize("name", READERS)
def test_what_is_nowhere_is_an_error_with_the_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a message that leaves open where the file was looked for."""
    monkeypatch.chdir(tmp_path)
    read, shipped = READERS[name]
    missing = (
        {"model_name_or_path": "models/none", "chat_template_path": "none.jinja"}.get(name)
        or {"--strategy": "none", "extends": "none", "--recipe": "none"}.get(name)
        or f"{Path(shipped or '').parent}/none{Path(shipped or '').suffix}"
    )
    if name == "--tasks":
        missing = "data/none.jsonl"
    with pytest.raises(StepladderError) as caught:
        read(missing)
    assert f"looked in {tmp_path}" in caught.value.render(), caught.value.render()


def test_a_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a user's own recipes/lora.yaml and data/techco.jsonl against those that ship."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("recipes/lora.yaml", "seed: 7\n"), (ROWS, '{"input": "a", "output": "b"}\n')):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    assert child("lora") == {"seed": 7} and len(rows(dataset_name=ROWS)[0]) == 1
    Path(ROWS).unlink()
    Path(ROWS).symlink_to("gone")  # a link that leads nowhere is the user's too
    with pytest.raises(StepladderError, match="is a link to"):
        rows(dataset_name=ROWS)


def test_only_what_ships_is_taken_from_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards secrets and code beside the shipped folders: no path leads out of these."""
    monkeypatch.chdir(tmp_path)
    for name in ("pyproject.toml", "data/../pyproject.toml", "recipes/../../b/README.md", "src", "tests/tiny.py"):
        assert installation.locate(name) == Path(name)
    assert installation.locate("") == Path() and installation.locate("/data") == Path("/data")


def test_extends_beside_the_recipe_is_refused_with_the_right_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the one rule: a parent's path counted from the recipe's own folder, and data's from the shell's."""
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes/team", "other"):
        Path(folder).mkdir(parents=True)
        Path(folder, "parent.yaml").write_text("seed: 1\n")
        Path(folder, "child.yaml").write_text("extends: parent.yaml\n")
    for file, spelling in (("recipes/team/child.yaml", "team/parent"), ("other/child.yaml", "other/parent.yaml")):
        with pytest.raises(StepladderError) as caught:
            load.load(file, [])
        assert f"help: extends: {spelling} (" in caught.value.render(), caught.value.render()
        Path(file).write_text(f"extends: {spelling}\n")
        assert load.load(file, []).values == {"seed": 1}
    # two files of one name: the rule decides, and the other one is named
    Path("other/lora.yaml").write_text("seed: 2\n")
    Path("other/child.yaml").write_text("extends: lora\n")
    found = load.load("other/child.yaml", [])
    assert found.get("seed") == 42 and any("other/lora.yaml, which lies beside" in note for note in found.notes)
    # a user's lora.yaml that extends lora is itself
    Path("lora.yaml").write_text("extends: lora\n")
    with pytest.raises(StepladderError) as caught:
        load.load("lora", [])
    assert "in a circle" in caught.value.render() and f"extends: {ROOT}/recipes/lora.yaml" in caught.value.render()


# ---- commands in messages ----


@pytest.mark.parametrize("in_clone", [True, False])
def test_commands_are_spelled_for_the_folder(in_clone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards messages that tell to type what is not there."""
    monkeypatch.chdir(ROOT if in_clone else tmp_path)
    config = "accelerate_configs/ddp.yaml" if in_clone else f"{ROOT}/accelerate_configs/ddp.yaml"
    script = "scripts/sft.py" if in_clone else "-m stepladder.sft"
    check = "python scripts/check.py" if in_clone else "stepladder check"
    assert installation.command("check") == check
    launch = installation.launch_command("ddp", 2)
    assert launch == f"accelerate launch --config_file {config} --num_processes 2 {script}"
    for text in ("python scripts/check.py --recipe lora", "stepladder check --recipe lora"):
        assert installation.localize(text) == f"{check} --recipe lora"
    for words in ("scripts/sft.py", "-m stepladder.sft"):
        text = f"accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 {words}"
        assert installation.localize(text) == launch
    for text in ("data/my_data.py", "my.check.py", "stepladder is a package", "runs/sft.py", "sft.python"):
        assert installation.localize(text) == text


def test_a_folder_scripts_of_another_project_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scripts").mkdir()
    Path("scripts/check.py").touch()
    assert installation.command("check") == "stepladder check"


def test_no_message_spells_a_script_itself() -> None:
    """Guards `python scripts/x.py` in a message: it is right in a clone alone."""
    names = "|".join(installation.scripts())
    spelled = re.compile(rf"scripts/|(?<![\w./-])(?:{names})\.py\b")
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(file.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        found += [
            f"{file.name}:{node.lineno}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
            and spelled.search(node.value) and file.name != "installation.py"
        ]  # fmt: skip
    for file in [*(ROOT / "src").rglob("*.yaml"), *(ROOT / "src").rglob("*.html")]:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        found += [f"{file.name}: {line}" for line in lines if spelled.search(line)]
    assert found == []
