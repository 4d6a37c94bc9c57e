"""What the README says is so: its commands parse and start, its files lie where it says."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from conftest import ROOT, run, script

README = (ROOT / "README.md").read_text()
LADDER = [
    command.removeprefix("sbatch ").split('--wrap "')[-1].rstrip('"')  # what sbatch is asked to run
    for command in re.findall(r"`([^`\n]+)`", README)
    if re.match(r"(python|accelerate launch|sbatch) .*scripts/", command)
]


def test_the_ladder_is_found() -> None:
    assert len(LADDER) >= 5


@pytest.mark.parametrize("command", LADDER)
def test_commands_of_the_ladder(command: str, tmp_path) -> None:
    """Guards against a README whose recipe, config or flag is gone: each command runs up to the recipe's check.

    Its ranks are played one by one with a key that stops every run before torch is imported, so
    that a command for 8 GPUs is checked on a laptop: it must fail for that key and nothing else.
    """
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    name, arguments = words[at].removeprefix("scripts/").removesuffix(".py"), words[at + 1 :]
    flags = dict(itertools.pairwise(words[:at]))
    if config := flags.get("--config_file"):
        assert (ROOT / config).is_file()
    ranks = flags.get("--num_processes", "1")
    done = script(name, *arguments, "--model_name_or_path", "models/not-there", WORLD_SIZE=ranks)
    assert done.code == 2 and "models/not-there" in done.err, done
    assert done.err.count("✘") == 1, done


def test_every_script_is_in_the_table_and_has_help() -> None:
    listed = set(re.findall(r"^\| `(\w+\.py)`", README, flags=re.MULTILINE))
    assert listed == {file.name for file in (ROOT / "scripts").glob("*.py")}
    for name in listed:
        done = script(name.removesuffix(".py"), "--help")
        assert done.code == 0 and f"scripts/{name}" in done.out, done


def test_the_typo_in_the_readme_is_answered_as_shown() -> None:
    shown = README.split("$ python scripts/sft.py --recipe lora --learing_rate 1e-4\n")[1].split("```")[0]
    assert script("sft", "--recipe", "lora", "--learing_rate", "1e-4").err == shown


def test_folders_are_there() -> None:
    block = README.split("## The folders")[1].split("```")[1]
    for folder in re.findall(r"^(\S+)/ ", block, flags=re.MULTILINE):
        assert folder == "runs" or (ROOT / folder).is_dir(), folder


def test_make_help_lists_the_two_commands() -> None:
    done = run("make", "help")
    assert done.code == 0 and "make demo" in done.out and "make test" in done.out, done


def test_the_python_that_is_asked_for_is_what_the_libraries_need() -> None:
    """Guards an oldest Python with which the installation fails half-way, since a library refuses it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    for name in [Requirement(one).name for one in project["dependencies"]]:
        needed = importlib.metadata.metadata(name)["Requires-Python"]
        assert not needed or SpecifierSet(needed).contains(oldest), f"{name} needs Python {needed}"
    assert f"Python ≥ {oldest}," in README
    assert f"Python {oldest} or newer" in (ROOT / "docs/instructor.md").read_text()
    assert f"Python {oldest} or newer" in (ROOT / "Makefile").read_text()
    assert f"version_info < ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
