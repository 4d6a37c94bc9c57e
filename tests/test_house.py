"""The house keeps its floors: imports run downward or along a floor, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

from conftest import ROOT

SOURCE = ROOT / "src" / "stepladder"
FLOORS = [
    {
        "errors",
        "console",
        "files",
        "flags",
        "generators",
        "hardware",
        "installation",
        "manifest",
        "requirements",
        "screen",
        "settings",
        "starter",
        "suggest",
    },
    {"recipe", "data", "model", "run"},
    {"training", "planning", "evaluation", "reporting", "cluster"},
    {"preflight", "session"},
    {"__main__", "sft"},
]
FILES = sorted(SOURCE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1]


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stepladder"):
            parts = node.module.split(".")
            found |= {node.module} if len(parts) > 1 else {f"stepladder.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("stepladder.")}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_run_downward(file: Path) -> None:
    """Guards the structure: a room that reaches up can no longer be read without those above it."""
    here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module in imported(file):
        there = room(module)
        if there != here:
            assert floor(there) <= floor(here), f"{file.relative_to(ROOT)} imports {module}"


def test_rooms_import_in_no_circle() -> None:
    """Guards neighbours: two rooms that need each other are one room."""
    needs: dict[str, set[str]] = {}
    for file in FILES:
        here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        needs.setdefault(here, set()).update(room(module) for module in imported(file))
    order = graphlib.TopologicalSorter({here: there - {here} for here, there in needs.items()})
    assert list(order.static_order())  # a circle raises CycleError, which names it


def test_every_module_has_a_floor() -> None:
    rooms = {file.relative_to(SOURCE).parts[0].removesuffix(".py") for file in FILES} - {"__init__"}
    assert rooms <= set().union(*FLOORS)


# What is larger than a reader can hold. These lists may only become shorter.
LONG_MODULES: set[str] = set()
LONG_SCRIPTS: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def test_modules_scripts_and_functions_fit_in_the_head() -> None:
    """Guards the size of things: a module has at most 400 lines, a script 80, a function 60."""
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    lines = {file: len(file.read_text().splitlines()) for file in [*FILES, *scripts]}
    assert {file.name for file in FILES if lines[file] > 400} == LONG_MODULES
    assert {file.name for file in scripts if lines[file] > 80} == LONG_SCRIPTS
    assert {
        f"{file.name}:{node.name}"
        for file in lines
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60
    } == LONG_FUNCTIONS


def test_names_say_one_thing() -> None:
    """Guards a reader who looks for a module or a function by its name: no two modules and scripts have one base name,
    and no function has a name that says nothing."""
    files = [*FILES, *(ROOT / "scripts").glob("*.py")]
    # stepladder/sft.py is scripts/sft.py, by the name that `accelerate launch -m` takes
    stems = [file.stem for file in files if file.name != "__init__.py" and file != SOURCE / "sft.py"]
    assert {stem for stem in stems if stems.count(stem) > 1} == set()
    vague = {"of", "told", "own", "given", "said", "found", "named", "shown", "opened", "refused"}
    assert [
        f"{file.name}:{node.name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in vague
    ] == []


def test_scripts_name_their_command() -> None:
    """Each script's docstring holds the command that a person types."""
    for file in (ROOT / "scripts").glob("*.py"):
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert re.search(rf"(python|accelerate launch) .*scripts/{file.name}", doc), file


def test_whether_code_is_trusted_is_yes_or_no() -> None:
    """Guards the terminal: of a key that nobody has set Transformers makes a question, and waits for its answer."""
    asked = re.compile(r'(?<!bool\()(?:recipe|settings)\.get\("trust_remote_code"\)')
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert [
        str(file) for file in files if "from_pretrained" in file.read_text() and asked.search(file.read_text())
    ] == []
