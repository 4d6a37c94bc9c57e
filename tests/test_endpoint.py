"""A server of chat completions as a side: what it answers, and what goes wrong with servers."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import script
from stepladder.errors import ModelError
from stepladder.evaluation import endpoint
from stepladder.evaluation.endpoint import Endpoint
from stepladder.evaluation.generate import Answer


class Server(BaseHTTPRequestHandler):
    """A server of chat completions that does what its class says."""

    behave = "well"
    asked = 0
    counting = threading.Lock()  # a thread a request

    def do_POST(self) -> None:
        with self.counting:
            type(self).asked += 1
            first = self.asked == 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        good = {"choices": [{"message": {"content": f" re: {question} "}, "finish_reason": "stop"}]}
        status, text = 200, json.dumps(good)
        if self.behave == "busy once" and first:
            status, text = 503, "busy"
        elif self.behave == "unknown model":
            status, text = 404, "no such model"
        elif self.behave == "nonsense":
            text = "<html>Welcome to nginx!</html>"
        elif self.behave == "another API":
            text = '{"choices": []}'
        elif self.behave == "slow":
            time.sleep(0.5)
        self.send_response(status)
        self.end_headers()
        if self.behave == "drips":
            with contextlib.suppress(OSError):  # the other side hangs up
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.02)
        self.wfile.write(text.encode() + b" " * (endpoint.MOST if self.behave == "endless" else 0))

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)

    class Here(Server):
        asked = 0

    http = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield Here, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


ASKED = [[{"role": "user", "content": str(n)}] for n in range(6)]


@pytest.mark.parametrize("tail", ["", "/", "/v1"])
def test_a_server_answers_in_the_order_asked(server, tail: str) -> None:
    _, url = server
    found = endpoint.answers(Endpoint(url + tail, "m", 5), ASKED, 8)
    assert found == [Answer(f"re: {n}", True) for n in range(6)]


def test_a_busy_server_is_asked_again(server) -> None:
    here, url = server
    here.behave = "busy once"
    assert len(endpoint.answers(Endpoint(url, "m", 5), ASKED, 8)) == 6 and here.asked == 7


@pytest.mark.parametrize(
    ("behave", "said", "asked"),
    [("nonsense", "no chat completion", 1), ("another API", "no chat completion", 1),
     ("unknown model", "HTTP 404: no such model", 1), ("slow", "timed out", endpoint.TRIES),
     ("drips", "timed out in the middle", endpoint.TRIES), ("endless", "more than", endpoint.TRIES)],
)  # fmt: skip
def test_a_server_that_does_not_answer_ends_clearly(server, behave: str, said: str, asked: int) -> None:
    """Guards against hanging, against endless retries, and against a traceback out of a foreign reply."""
    here, url = server
    here.behave = behave
    with pytest.raises(ModelError, match=said):
        endpoint.answers(Endpoint(url, "m", 5 if behave == "endless" else 0.1), ASKED[:1], 8)
    assert here.asked == asked


def test_a_server_that_is_down_is_named(monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    with pytest.raises(ModelError, match=r"127.0.0.1:9 gives no answer"):
        endpoint.answers(Endpoint("http://127.0.0.1:9", "m", 1), ASKED[:1], 8)
    for address in ("localhost", "http://..x", "http://", "ftp://x"):  # the second fails where the name is looked up
        with pytest.raises(ModelError, match="is no address"):
            endpoint.answers(Endpoint(address, "m", 1), ASKED[:1], 8)


def test_the_base_may_be_a_server(server, tiny, tmp_path: Path) -> None:
    """Guards compare.py's command line with a server in the base's place, and the notes on what it cannot tell."""
    _, url = server
    done = script("compare", "--endpoint", url, "--model", "m", "--tuned", tiny, "--data", "data/techco_eval.jsonl",
                  "--limit", 2, "--max_new_tokens", 4, "--output_dir", tmp_path)  # fmt: skip
    assert done.code == 0, done
    facts = json.loads((tmp_path / "compare.json").read_text())
    base, tuned = facts["sides"]
    assert base["name"] == f"m at {url}" and base["answers"][0].startswith("re: ")
    assert "loss" in tuned and "loss" not in base and facts["metrics"][0]["sides"][0] is None
    assert any("tells no losses" in note and "forgetting" in note for note in facts["notes"]), facts["notes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--endpoint", "http://127.0.0.1:9"], "gives no answer"), (["--endpoint", "http://..x"], "is no address"),
     (["--endpoint", "http://x", "--timeout", "-1"], "not above 0"),
     (["--endpoint", "http://x", "--timeout", "1e20"], "1e20 is more than")],
)  # fmt: skip
def test_a_server_that_is_down_is_told_before_anything_is_done(words: list, said: str, tiny, tmp_path: Path) -> None:
    """Guards against minutes of the base's answers, and a folder, before the server's absence is told."""
    done = script("compare", "--base", tiny, *words, "--model", "m", "--prompts", "docs/workshop/questions.txt",
                  "--output_dir", tmp_path / "out")  # fmt: skip
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done
    assert not done.out and not (tmp_path / "out").exists()
