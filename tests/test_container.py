"""The two images of container/: made of the same files by the same script, with the versions of constraints.txt."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

DOCKERFILE, DEFINITION = (ROOT / f"container/{name}" for name in ("Dockerfile", "stepladder.def"))
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions with their words."""
    lines = (line.split() for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#"))
    return [(words[0], words[1:]) for words in lines]


def sections() -> dict[str, str]:
    """The definition's sections; its header is the section ``."""
    header, *parts = re.split(r"^%(\w+)\n", DEFINITION.read_text(), flags=re.MULTILINE)
    return {"": header, **dict(zip(parts[::2], parts[1::2], strict=True))}


def test_both_images_are_made_of_the_same() -> None:
    """Guards two lists against each other: base, arguments and files; and a base that is another one tomorrow."""
    arguments = dict(re.findall(r"^\s+(\w+)=(.*)$", sections()["arguments"], re.MULTILINE))
    in_docker = dict([*word.split("="), ""][:2] for name, words in instructions() if name == "ARG" for word in words)
    of_a_mirror = {"BOOTSTRAP": "docker", "RELEASE": "bookworm", "MIRROR": "none"}
    assert arguments == in_docker | of_a_mirror
    assert arguments["BASE"] == "debian:12-slim", "12 is bookworm"
    assert set(re.findall(r"\{\{ (\w+) \}\}", DEFINITION.read_text())) == {*arguments}, "each is used"
    copied = [source for name, words in instructions() if name == "COPY" for source in words[:-1]]
    files = [line.split() for line in sections()["files"].splitlines() if line]
    assert [source for source, _ in files] == copied
    assert all(target == f"/opt/stepladder/{source}" and (ROOT / source).exists() for source, target in files)
    shipped = ast.literal_eval(re.findall(r"^FOLDERS = (\(.*\))$", (ROOT / "setup.py").read_text(), re.MULTILINE)[0])
    assert {*shipped, "setup.py", "src"} <= {*copied}, "a package without its recipes and scripts"
    assert (["bash", "container/install.sh"]) in [words for name, words in instructions() if name == "RUN"]
    assert "bash container/install.sh\n" in sections()["post"]


@pytest.mark.parametrize("variant", ["cpu", "cuda", "tpu"])
def test_the_packages_are_those_of_the_constraints(tmp_path: Path, variant: str) -> None:
    """Guards the versions, and their order: DeepSpeed's build imports torch. apt-get and python note their words."""
    tools, installed = tmp_path / "bin", tmp_path / "installed"
    tools.mkdir()
    for name in ("apt-get", "python", "rm"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{installed}\n')
        (tools / name).chmod(0o755)
    for name in ("bash", "grep"):
        (tools / name).symlink_to(str(shutil.which(name)))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    done = subprocess.run([tools / "bash", ROOT / "container/install.sh"], cwd=tmp_path, text=True, capture_output=True,
                          env={"PATH": str(tools), "VARIANT": variant})  # fmt: skip
    if variant == "tpu":
        assert done.returncode == 2 and "cuda or cpu" in done.stderr and not installed.exists()
        return
    assert done.returncode == 0, done
    pip = [line.split() for line in installed.read_text().splitlines() if line.startswith("python -m pip install")]
    assert all("--constraint" in words for words in pip[1:]), "all but pip and setuptools themselves"
    torch = f"torch=={PINNED['torch']}+cpu" if variant == "cpu" else "torch"
    extras = "monitoring" if variant == "cpu" else "monitoring,gpu"
    assert [words[-1] for words in pip[1:]] == [torch, f".[{extras}]", ".[deepspeed]"]
    assert "--no-build-isolation" in pip[-1]
    known = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in known for name in (*extras.split(","), "deepspeed"))


def test_the_images_shell_lines_are_clean(tmp_path: Path) -> None:
    """Guards what `make lint` does not see: the definition's sections and the Dockerfile's RUN lines."""
    lines = [" ".join(words) for name, words in instructions() if name == "RUN"]
    parts = [sections()[name].replace("{{ ", "").replace(" }}", "") for name in ("post", "environment")]
    for number, text in enumerate(("\n".join(lines), *parts)):
        (script := tmp_path / f"{number}.sh").write_text(f"#!/bin/sh\n{text}\n")
        tool = shutil.which("shellcheck", path=Path(sys.executable).parent)
        done = subprocess.run([str(tool), "--exclude=SC2164", script], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout
