"""The fixture `played`: the page of the workshop that a test is called after, run in a folder of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pages
from conftest import ROOT
from tiny import make_tiny


@pytest.fixture(scope="session")
def player(smollm2: Path) -> Iterator[pages.Player]:
    made = pages.Player()
    yield made
    made.close()


class Played:
    """A page that has been run in a folder of its own: what each of its commands printed, and what lies there."""

    def __init__(self, folder: Path, outputs: list[str]):
        self.folder, self.outputs = folder, outputs

    def run(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "runs" / name / "run.json").read_text())

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def played(request: pytest.FixtureRequest, player: pages.Player, tmp_path: Path) -> Played:
    """The page that a test is called after: test_2_2_… plays docs/workshop/2.2-….md."""
    number = re.match(r"test_(\d)_(\d+)_", request.function.__name__)
    assert number, request.function.__name__
    (page,) = (ROOT / "docs/workshop").glob(f"{number[1]}.{number[2]}-*.md")
    pages.lay_out(tmp_path)
    make_tiny(tmp_path / "models/tiny")
    outputs = []
    for block in pages.blocks(page):
        for command in block.commands:
            code, output = player.play(pages.shortened(command, block), tmp_path)
            assert code == 0, f"$ {command}\n{output}"
            outputs.append(output)
    return Played(tmp_path, outputs)
