"""The workshop's pages: each command runs as it is written, and what the page promises is seen."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("page", "command"), ELSEWHERE)
def test_the_same_elsewhere(page: str, command: str) -> None:
    """Guards the tables of commands for GPUs, nodes and Slurm: each runs up to the check of its model."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "slurm/")))
    flags, arguments = dict(itertools.pairwise(words[:at])), words[at + 1 :]
    if config := flags.get("--config_file"):
        assert (ROOT / config).is_file()
    assert (ROOT / words[at]).is_file()
    if "--strategy" in arguments:
        where = arguments.index("--strategy")
        del arguments[where : where + 2]
    ranks = flags.get("--num_processes", "1")
    done = script("sft", *arguments, "--model_name_or_path", "models/not-there", WORLD_SIZE=ranks)
    assert done.code == 2 and "models/not-there" in done.err and done.err.count("✘") == 1, done


def test_2_2_rank_doubling(played: Played) -> None:
    """Twice the rank, exactly twice the trainable parameters."""
    eight, sixteen = (played.run(name)["parameters"]["trainable"] for name in ("rank8", "rank16"))
    assert sixteen == 2 * eight
