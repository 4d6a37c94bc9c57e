"""The workshop's pages: each command runs as it is written, and what the page promises is seen."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import pages
from conftest import ROOT, script
from played import Played

PAGES = sorted((ROOT / "docs/workshop").glob("*.md"))
ELSEWHERE = [
    (page.stem, command)
    for page in PAGES
    for command in re.findall(r"^\|[^|]*\| `([^`\n]+)` \|", page.read_text(), flags=re.MULTILINE)
]


def test_every_page_has_its_test() -> None:
    """Guards the promise that each page's observation is checked."""
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_workshop*.py"))
    tested = {match.groups() for match in re.finditer(r"^def test_(\d)_(\d+)_", text, re.MULTILINE)}
    assert tested == {tuple(page.stem.split("-")[0].split(".")) for page in PAGES if page.stem != "index"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_announced_is_shown(page: Path) -> None:
    """Guards against a page that says what a command prints and then shows nothing."""
    assert not pages.unfilled(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_has_the_rows_for_elsewhere(page: Path) -> None:
    """Guards the promise that each activity is scaled from one GPU to a node and to Slurm."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page.read_text().split("## The same elsewhere")[-1], re.MULTILINE)
    assert any("one GPU" in where for where, _ in rows), rows
    assert any("node" in where for where, _ in rows), rows
    assert any("sbatch" in command for _, command in rows), rows


@pytest.mark.parametrize(("page", "command"), ELSEWHERE)
def test_the_same_elsewhere(page: str, command: str, tmp_path: Path) -> None:
    """Guards the tables of commands for GPUs, nodes and Slurm: each runs up to the check of its model."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "slurm/")))
    assert (ROOT / words[at]).is_file()
    if words[at] == "slurm/script.sbatch":
        words[at : at + 2] = [f"scripts/{words[at + 1]}"]
    flags = dict(re.findall(r"(--[\w-]+)[ =](\S+)", " ".join(words[:at])))
    arguments = words[at + 1 :]
    if config := flags.get("--config_file"):
        assert (ROOT / config).is_file()
    if "runs/axolotl-techco.yaml" in arguments:
        recipe = str(tmp_path / "recipe.yaml")
        assert script("import_axolotl", "docs/workshop/axolotl_techco.yml", "-o", recipe).code == 0
        arguments[arguments.index("runs/axolotl-techco.yaml")] = recipe
    ranks = int(flags.get("--num_processes", int(flags.get("--gpus-per-node", 1)) * int(flags.get("--nodes", 1))))
    name = Path(words[at]).stem if words[at].startswith("scripts/") else "sft"
    if name in ("check", "inspect_model"):
        done = script(name, *arguments)
        assert done.code == 0, done
        return
    model = {"generate": "--model", "compare": "--base", "merge": "--adapter"}.get(name, "--model_name_or_path")
    if model in arguments:
        arguments[arguments.index(model) + 1] = "models/not-there"
    else:
        arguments += [model, "models/not-there"]
    if "--output_dir" in arguments:  # where a person has been through the workshop, it is there already
        arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "out")
    done = script(name, *arguments, WORLD_SIZE=str(ranks))
    assert done.code == 2 and "models/not-there" in done.err and done.err.count("✘") == 1, done


def test_2_2_rank_doubling(played: Played) -> None:
    """Twice the rank, exactly twice the trainable parameters."""
    eight, sixteen = (played.run(name)["parameters"]["trainable"] for name in ("rank8", "rank16"))
    assert sixteen == 2 * eight
    assert "--array=0-3" in played.outputs[-1] and "slurm/sweeps/lora_rank.yaml" in played.outputs[-1]


def test_2_3_lora_without_regret(played: Played) -> None:
    """A sweep without Slurm: each rate has its run and the report names the best; what has finished rests."""
    first, second = played.outputs
    for rate in ("1e-4", "1e-3"):
        assert played.run(f"two_rates/learning_rate={rate}")["status"] == "finished"
    assert "run 2 of 2" in first and "held-out loss" in first.splitlines()[-3]
    assert "run 1 of 2" not in second and "runs/two_rates/report.html" in second
