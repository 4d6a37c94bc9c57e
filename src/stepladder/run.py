"""The run folder: what was asked for, what happened, and where everything lies."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder.errors import LaunchError

PACKAGES = (
    "stepladder",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
)
MANIFEST, METRICS, RECIPE = "run.json", "metrics.jsonl", "recipe.yaml"


class Run:
    """A run folder that rank 0 writes and the other ranks only know the path of."""

    def __init__(self, folder: Path, is_writer: bool):
        self.folder, self.is_writer = folder, is_writer
        self.manifest: dict[str, Any] = {}

    def claim(self, overwrite: bool, where: str = "") -> None:
        """Make sure that the folder is free for a new run.

        Raises:
            LaunchError: it holds a run (unless `overwrite`), or files that are no run's, which no
                flag removes.
        """
        folder = self.folder
        if not self.is_writer or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        if not (folder / MANIFEST).is_file():
            raise LaunchError(
                f"output_dir {folder} exists and is no run folder",
                where=where,
                why="nothing that existed is overwritten",
                way_out="another --output_dir",
            )
        if not overwrite:
            raise LaunchError(
                f"output_dir {folder} holds a run ({status(folder)})",
                where=where,
                why="nothing that existed is overwritten",
                way_out="another --output_dir, or --overwrite to replace that run",
            )
        shutil.rmtree(folder)

    def begin(self, recipe_yaml: str, **facts: Any) -> None:
        """Make the folder, write the resolved recipe and the manifest with `status: running`."""
        self.manifest = {
            "status": "running",
            "git_commit": git_commit(),
            "packages": package_versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "wandb_run_id": None,
            **facts,
        }
        if self.is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / RECIPE, recipe_yaml)
            (self.folder / METRICS).write_text("")
            self._write()

    def update(self, **facts: Any) -> None:
        self.manifest.update(facts)
        self._write()

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_writer:
            with (self.folder / METRICS).open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """`finished` at the end of the block, `failed` with its reason where it raises."""
        try:
            yield
        except BaseException as error:
            self.update(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise
        self.update(status="finished", ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def _write(self) -> None:
        if self.is_writer:
            write_whole(self.folder / MANIFEST, json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")


def status(folder: Path) -> str:
    try:
        return str(json.loads((folder / MANIFEST).read_text())["status"])
    except (OSError, ValueError, KeyError):
        return "unreadable"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of the working folder, with `+` where files differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):

        def git(*words: str) -> str:
            return subprocess.run(("git", *words), capture_output=True, text=True, check=True).stdout.strip()

        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return None
