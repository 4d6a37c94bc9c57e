"""As much of the hub as its client needs to fetch repositories: their commit, their files, and each file."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PATH = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<id>[\w.-]+/[\w.-]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub(ThreadingHTTPServer):
    """Serves on a free port until the block ends.

    Attributes:
        repositories: folders by `model org/name` or `dataset org/name`.
        gated: the ids whose files nobody may read.
        pause: seconds between two blocks of a file.
        asked: the paths of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.pause = 0.0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def commit_of(folder: Path) -> str:
    """Forty hexadecimal digits that change with the files."""
    content = b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files_of(folder))
    return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        found = PATH.match(path) or FILE.match(path)
        kind = "dataset" if found and (found["kind"] or "").startswith("dataset") else "model"
        folder = self.server.repositories.get(f"{kind} {found['id']}") if found else None
        if not found or folder is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = commit_of(folder)
        if found["revision"] not in (None, "main", commit):
            return self.answer({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if "file" in found.groupdict() and found["id"] in self.server.gated:  # what is in it may be seen
            return self.answer({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if "file" in found.groupdict():
            return self.send_file(folder / found["file"], commit)
        names = [str(file.relative_to(folder)) for file in files_of(folder)]
        if found["what"] == "tree":
            tree = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
                    for name in names]  # fmt: skip
            return self.answer(tree)
        self.answer({"id": found["id"], "sha": commit, "siblings": [{"rfilename": name} for name in names]})

    def send_file(self, file: Path, commit: str) -> None:
        content = file.read_bytes()
        begin = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        for name, value in {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                            "Content-Length": str(len(content) - begin)}.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            for start in range(begin, len(content), 1 << 14):
                self.wfile.write(content[start : start + (1 << 14)])
                time.sleep(self.server.pause)

    def answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
