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
from stepladder.evaluation.questions import Answer


class Server(BaseHTTPRequestHandler):
    """A server of chat completions that does what its class says."""

    behave = "well"
    elsewhere = ""
    asked = sent = 0
    counting = threading.Lock()  # a thread a request

    def do_POST(self) -> None:
        with self.counting:
            type(self).asked += 1
            number = self.asked
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        good = {"choices": [{"message": {"content": f" re: {question} "}, "finish_reason": "stop"}]}
        status, text = 200, json.dumps(good)
        if self.behave == "busy once" and number == 1:
            status, text = 503, "busy"
        elif self.behave == "unknown model":
            status, text = 404, "no such model"
        elif self.behave == "nonsense":
            text = "<html>Welcome to nginx!</html>"
        elif self.behave == "another API":
            text = '{"choices": []}'
        elif self.behave == "slow":
            time.sleep(0.5)
        elif self.behave == "nested":
            text = "[" * 100_000
        elif self.behave == "halves":
            text = json.dumps(good).replace("re:", "re: \\ud83d")
        elif self.behave == "refuses":
            status, text = 401, f"wrong key: {self.headers['Authorization']}"
        elif self.behave == "endless refusal":
            status = 500
        elif self.behave == "tires" and number > 4:
            status, text = 400, "no more"
        elif self.behave == "redirects":
            status = 307
        if self.behave == "drips in its head":
            with contextlib.suppress(OSError):
                for part in (b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 100):
                    self.wfile.write(part)
                    time.sleep(0.02)
            return
        self.send_response(status)
        if status == 307:
            self.send_header("Location", f"{self.elsewhere}/v1/chat/completions?key=secret")
        self.end_headers()
        if self.behave == "endless refusal":
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b"x" * 100_000)
                    type(self).sent += 100_000
            return
        if self.behave == "drips":
            with contextlib.suppress(OSError):  # the other side hangs up
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.02)
        with contextlib.suppress(OSError):
            self.wfile.write(text.encode() + b" " * (endpoint.MOST if self.behave == "endless" else 0))

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def serving():
    class Here(Server):
        asked = sent = 0

    http = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield Here, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    with serving() as here:
        yield here


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
     ("drips", "timed out", endpoint.TRIES), ("drips in its head", "timed out", endpoint.TRIES),
     ("nested", "no chat completion", 1), ("endless refusal", "HTTP 500: xxx", endpoint.TRIES),
     ("endless", "more than", endpoint.TRIES)],
)  # fmt: skip
def test_a_server_that_does_not_answer_ends_clearly(server, behave: str, said: str, asked: int) -> None:
    """Guards against hanging, against endless retries, and against a traceback out of a foreign reply."""
    here, url = server
    here.behave = behave
    with pytest.raises(ModelError, match=said):
        endpoint.answers(Endpoint(url, "m", 5 if behave == "endless" else 0.1), ASKED[:1], 8)
    assert here.asked == asked
    assert here.sent < endpoint.TRIES * 20e6, "a refusal was read to its end"


def test_no_other_server_gets_the_key(server, monkeypatch) -> None:
    """Guards the key and the questions: a redirect led them to whatever address the server named."""
    here, url = server
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-secret")
    here.behave = "redirects"
    with serving() as (there, elsewhere):
        here.elsewhere = elsewhere
        with pytest.raises(ModelError, match=f"sends us to '{elsewhere}") as raised:
            endpoint.answers(Endpoint(url, "m", 5), ASKED[:1], 8)
        assert there.asked == 0 and here.asked == 1 and "secret" not in str(raised.value)


def test_secrets_are_not_printed(server, monkeypatch) -> None:
    """Guards passwords in an address, and a key that a server repeats in its refusal or that no header can hold."""
    here, url = server
    for address in ("http://me:hun/ter2@localhost", "http://x/?api_key=hunter2", "me:hunter2@..x"):
        with pytest.raises(ModelError, match="more than an address") as raised:
            endpoint.answers(Endpoint(address, "m", 1), ASKED[:1], 8)
        assert "ter2" not in str(raised.value) + str(Endpoint(address, "m"))
    here.behave = "refuses"
    for key, said in (("sk-secret", "HTTP 401: wrong key: Bearer …"), ("sk-secret\n", "Bearer …"),
                      ("sk-secret\nX", "no key has"), ("sk-secret é", "no key has")):  # fmt: skip
        monkeypatch.setenv(endpoint.KEY_VARIABLE, key)
        with pytest.raises(ModelError, match=said) as raised:
            endpoint.answers(Endpoint(url, "m", 5), ASKED[:1], 8)
        assert "sk-secret" not in str(raised.value)


def test_half_a_character_is_told(server) -> None:
    """Guards against a traceback when the files are written, after all answers were made: JSON can hold what they
    cannot."""
    here, url = server
    here.behave = "halves"
    notes: list[str] = []
    found = endpoint.answers(Endpoint(url, "m", 5), ASKED[:5], 8, notes=notes)
    assert found[0].text == "re: \ufffd 0" and len(notes) == 1 and "lone surrogates" in notes[0]
    asked = [[{"role": "user", "content": "\ud83d"}]]
    assert len(endpoint.answers(Endpoint(url, "m", 5), asked, 8)) == 1


def test_a_comparison_goes_on_where_the_server_failed(server, tiny, tmp_path: Path) -> None:
    """Guards the answers that were made before a server failed, or was killed in the middle of one: an hour of them was
    lost. Another model's or length's answers are not taken for these, and the next comparison asks anew."""
    here, url = server
    here.behave = "tires"
    words = ["compare", "--endpoint", url, "--model", "m", "--tuned", tiny, "--data", "data/techco_eval.jsonl",
             "--limit", 6, "--max_new_tokens", 4, "--output_dir", tmp_path]  # fmt: skip
    done = script(*words)
    kept = tmp_path / "server_answers.jsonl"
    assert done.code == 2 and "no more" in done.err and str(kept) in done.err and "Traceback" not in done.err, done
    assert not (tmp_path / "compare.json").exists()
    assert (made := len(kept.read_text().splitlines())) == 3  # after the probe's one, of the first four
    with kept.open("a") as file:
        file.write(
            '{"model": "another", "max_new_tokens": 4, "messages": [1, {"content": ""}], "stopped": true}\n{"mod'
        )
    assert not endpoint.Kept(kept, Endpoint(url, "another"), 4).known
    assert not endpoint.Kept(kept, Endpoint(url, "m"), 5).known
    here.behave, here.asked = "well", 0
    done = script(*words)
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert done.code == 0 and here.asked == 1 + 6 - made and not kept.exists(), done
    assert all(answer.startswith("re: ") for answer in facts["sides"][0]["answers"])
    assert any(f"{made} answers" in note for note in facts["notes"]), facts["notes"]


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
