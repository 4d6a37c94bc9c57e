"""Writes notebooks/workshop.ipynb from the workshop's pages: levels 1 to 3, for Colab or a CPU.

python tests/notebook.py
"""

from __future__ import annotations

import json
import re
from typing import Any

import pages

FILE = pages.ROOT / "notebooks/workshop.ipynb"
HEAD = """# Stepladder: the workshop, levels 1 to 3

On Colab, choose a GPU (Runtime, Change runtime type, T4: it computes in fp16) or stay on the CPU. Each section is a
page of `docs/workshop/`, with its questions and answers. This notebook was not run on Colab yet.

The project has no public address yet: set `REPOSITORY` to yours, or upload the folder as `/content/stepladder`. If the
notebook lies in the project's folder, it uses that one."""
INSTALL = """REPOSITORY = "https://YOUR-ADDRESS/stepladder.git"
import pathlib, os
for folder in (".", "..", "stepladder"):
    if pathlib.Path(folder, "recipes/lora.yaml").is_file():
        os.chdir(folder)
        break
else:
    !git clone {REPOSITORY} stepladder
    os.chdir("stepladder")
!pip install --quiet -e .
!python scripts/fetch_model.py"""


def notebook() -> dict[str, Any]:
    """The notebook as Jupyter's format 4 has it, without outputs."""
    cells = [_cell("markdown", HEAD), _cell("code", INSTALL)]
    for page in sorted((pages.ROOT / "docs/workshop").glob("[123].*.md")):
        text = page.read_text(encoding="utf-8")
        title, goal = text.splitlines()[0], re.search(r"\*\*Goal\.\*\* (.*?)\n\n", text, re.DOTALL)
        goal_text = goal[1].replace("\n", " ") if goal else ""
        cells.append(_cell("markdown", f"#{title}\n\n{goal_text} [The page](../docs/workshop/{page.name})"))
        for block in pages.blocks(page):
            cells += [_cell("code", f"!{command}") for command in block.commands]
    cells = [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, text: str) -> dict[str, Any]:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True), **code}


if __name__ == "__main__":
    FILE.write_text(json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
