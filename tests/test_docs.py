"""The documentation as a site: it builds without a warning, every page is in its menu, and it loads nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from conftest import ROOT, run
from stepladder.data import columns, conversation, formats
from stepladder.data.read import READERS

sys.path.append(str(ROOT / "benchmarks"))
import bars
import which_method


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Guards against dead links and anchors, and against pages that call home in a classroom without a network."""
    build = ("mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    done = run(sys.executable, "-m", *build, NO_MKDOCS_2_WARNING="1")
    assert done.code == 0, done
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(https?://[^\"'> ]+)", page.read_text())
        assert not loaded, f"{page}: {loaded}"


def test_every_page_is_in_the_menu() -> None:
    """Guards against a page that nobody finds."""
    listed = set(re.findall(r"[\w./-]+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_every_make_target_that_is_named_exists() -> None:
    """Guards against a command that a page, a recipe or a comment promises and nobody can type."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = [ROOT / "README.md"]
    for folder in ("docs", "src", "scripts", "recipes", "benchmarks", "tests", "slurm"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".md", ".py", ".yaml", ".sh", ".html"}]
    for path in files:
        named = set(re.findall(r"`make ([a-z-]+)[` ]", path.read_text(encoding="utf-8")))
        assert named <= targets, f"{path}: {named - targets}"


def test_the_bars_are_those_of_the_tables() -> None:
    """Guards against a picture that a new measurement left behind (`python benchmarks/bars.py` draws them)."""
    page = (ROOT / "docs/benchmarks.md").read_text()
    tables = bars.tables(page)
    assert set(tables) == set(re.findall(r"img/(\w+)\.svg", page)) and len(tables) > 1
    for name, (unit, rows) in tables.items():
        assert (ROOT / f"docs/img/{name}.svg").read_text() == bars.drawing(unit, rows), name


def test_the_page_on_methods_is_the_plan() -> None:
    """Guards docs/which_method.md against a plan that has changed since (`python benchmarks/which_method.py`)."""
    page = (ROOT / "docs/which_method.md").read_text()
    titles = [machine.title for machine in which_method.MACHINES]
    assert f"| model | method | {' | '.join(titles)} |" in page
    (row,) = re.findall(r"^\| qwen3-0.6b \| lora \| (.*) \|$", page, re.MULTILINE)
    chosen = which_method.choose_for("qwen3-0.6b", "lora", which_method.MACHINES[3])
    assert chosen.cell == row.split(" | ")[3] and chosen.command in page


def test_the_page_of_data_names_every_shape() -> None:
    """Guards docs/data.md: each shape that rows may have, each role and each key that leaves a turn out."""
    page = (ROOT / "docs/data.md").read_text()
    listed = re.findall(r"^\| `([^`]+)` \|", page.split("## Messages")[0], re.MULTILINE)
    assert listed == [shape.name for shape in formats.SHAPES]
    for name in {*conversation.MASKS, *conversation.REASONING, *formats.FOR_ANSWER}:
        assert f"`{name}`" in page, name
    read = [kind for kind in READERS if kind not in (".py", ".jsonlines")]
    assert all(f"`{kind}`" in page for kind in read)


def test_the_row_on_the_page_of_data(smollm2: Path) -> None:
    """Guards the first lines of docs/data.md: the row as it is shown is the row as it is rendered."""
    from stepladder.data import render
    from stepladder.data.rows import Rows
    from stepladder.model import pretrained

    shown = (ROOT / "docs/data.md").read_text().split("```")[1]
    row = {"input": "Where is my order?", "output": "Look under Orders. 📦"}
    example = formats.to_example(row, "my.jsonl:1", columns.find_shape(row, "my.jsonl:1"))
    (rendered,) = render.tokenize(Rows("my.jsonl", [example], ["my.jsonl:1"]), pretrained.load_tokenizer(str(smollm2)))
    assert isinstance(rendered, render.Rendered)
    trained = sum(label != render.IGNORED for label in rendered.labels)
    assert f"my.jsonl:1 · {len(rendered.ids)} tokens, {trained} trained" in shown
