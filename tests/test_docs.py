"""The documentation as a site: it builds without a warning, every page is in its menu, and it loads nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from conftest import ROOT, run


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
