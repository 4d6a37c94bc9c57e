"""As much of a W&B server as its client needs: runs by id, and their history; or one that fails or hangs."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves on a free port until the block ends.

    Args:
        fault: `error` answers 500 to everything, `hang` answers nothing, `later` hangs once a run has begun.
    """

    daemon_threads = True
    request_queue_size = 128  # a client that finds the queue of 5 full waits for seconds, and then twice as long

    def __init__(self, fault: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = fault
        self.history: dict[str, dict[int, dict[str, Any]]] = {}  # of each run: line number → row
        self.summary: dict[str, dict[str, Any]] = {}
        self.exits: list[int] = []  # the exit code of each start
        self.preempted = False  # whether a start said that it is
        self.asked: dict[str, list[dict[str, Any]]] = {}  # of each GraphQL operation: its variables, in turn
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.ended.set()
        self.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))  # what is left unread breaks the pipe of an upload
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.fault == "error":
            return self.answer({"error": "out of order"}, 500)
        if self.server.fault == "hang" or (self.server.fault == "later" and "file_stream" in self.path):
            self.server.ended.wait()
        if "file_stream" in self.path:
            self.answer(self.stream(body))
        else:  # the client's own telemetry is no JSON
            self.answer({"data": self.graphql(json.loads(body))} if self.path == "/graphql" else {})

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, body: bytes) -> dict[str, Any]:
        run = self.path.split("/")[-2]
        content = json.loads(body)
        files = content.get("files", {})
        if "exitcode" in content:
            self.server.exits.append(content["exitcode"])
        self.server.preempted |= bool(content.get("preempting"))
        if part := files.get("wandb-summary.json"):
            self.server.summary[run] = json.loads(part["content"][-1])
        if part := files.get("wandb-history.jsonl"):
            for number, line in enumerate(part["content"], part["offset"]):
                self.server.history.setdefault(run, {})[number] = json.loads(line)
        return {}

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        name, variables = body["operationName"], body.get("variables") or {}
        self.server.asked.setdefault(name, []).append(variables)
        if name == "RunResumeStatus":
            return {"model": self.project(variables["project"]) | {"bucket": self.resumable(variables["name"])}}
        if name == "UpsertBucket":
            run = variables["name"]
            self.server.history.setdefault(run, {})
            bucket = {"id": run, "name": run, "displayName": run, "project": self.project("p")}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateArtifact":  # it has the files already: none is uploaded
            sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def project(self, name: str) -> dict[str, Any]:
        return {"id": name, "name": name, "entity": {"id": "e", "name": "e"}}

    def resumable(self, run: str) -> dict[str, Any] | None:
        """What the client asks of a run before it goes on with it."""
        if run not in self.server.history:
            return None
        lines = self.server.history[run]
        last = json.dumps(lines[max(lines)]) if lines else "{}"
        return {
            "id": run, "name": run, "summaryMetrics": last, "displayName": run, "logLineCount": 0,
            "historyLineCount": len(lines), "eventsLineCount": 0, "historyTail": json.dumps([last]),
            "eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": json.dumps({"t": {"value": {}}}),
        }  # fmt: skip
