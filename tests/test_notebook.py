"""The workshop's notebook has the pages' commands; test_workshop_1.py runs these as they stand on the pages."""

from __future__ import annotations

import json

import notebook

import pages


def test_the_notebook_has_the_commands_of_the_pages() -> None:
    """Guards against a notebook that drifts from its pages: `python tests/notebook.py` writes it again."""
    there = json.loads(notebook.FILE.read_text(encoding="utf-8"))
    assert there == notebook.notebook()
    source = ["".join(cell["source"]) for cell in there["cells"] if cell["cell_type"] == "code"]
    assert "pip install" in source[0] and "fetch_model.py" in source[0] and source[0].count("YOUR-ADDRESS") == 1
    wanted = [block.commands for page in sorted((pages.ROOT / "docs/workshop").glob("[123].*.md"))
              for block in pages.blocks(page)]  # fmt: skip
    assert source[1:] == [f"!{command}" for commands in wanted for command in commands]
    assert not any(cell.get("outputs") for cell in there["cells"])
