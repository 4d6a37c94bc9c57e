"""CONTRIBUTING.md lists each private name of another library that the code uses: what an upgrade has to look at."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from conftest import ROOT

FILES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
ROW = re.compile(r"^\| (\w+) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)


def listed() -> dict[str, set[str]]:
    """By library, the names in CONTRIBUTING.md's table."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Private names of the libraries")[1].split("\n## ")[0]
    rows: dict[str, set[str]] = {}
    for library, names in ROW.findall(section.split("| --- |", 1)[1]):
        rows.setdefault(library, set()).update(re.findall(r"`(\w+)`", names))
    return rows


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used() -> set[str]:
    """Private attributes, imports and overridden methods of what is not defined in this repository."""
    from trl import SFTTrainer

    trees = [list(ast.walk(ast.parse(file.read_text()))) for file in FILES]
    # Attributes that our own classes set, and those of namedtuple and os.
    ours = {"_asdict", "_replace", "_exit"} | {
        target.attr
        for tree in trees
        for node in tree
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in ast.walk(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }
    found: set[str] = set()
    for tree in trees:
        defined = {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        found |= {node.attr for node in tree if isinstance(node, ast.Attribute) and node.attr not in defined | ours}
        for node in tree:
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("stepladder"):
                found |= {*node.module.split("."), *(alias.name for alias in node.names)}
            if isinstance(node, ast.ClassDef) and "SFTTrainer" in map(ast.unparse, node.bases):
                names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                found |= {name for name in names if hasattr(SFTTrainer, name)}
    return set(filter(private, found))


def test_the_list_of_private_names_is_complete() -> None:
    """Guards an upgrade of a library against a private name that nobody knew was used."""
    names = set().union(*listed().values())
    assert used() - names == set(), "used, and not in CONTRIBUTING.md"
    assert names - used() == set(), "in CONTRIBUTING.md, and no longer used"


def test_the_private_names_are_in_the_installed_libraries() -> None:
    """Guards the code against a library's new version that has renamed one of them: an assignment would not notice."""
    for library, names in listed().items():
        spec = importlib.util.find_spec(library)
        assert spec and spec.origin, library
        missing = set(names)
        for file in Path(spec.origin).parent.rglob("*.py"):
            if not missing:
                break
            text = file.read_bytes()
            missing -= {name for name in missing if name.encode() in text}
        assert not missing, f"{library} has no {missing}"
