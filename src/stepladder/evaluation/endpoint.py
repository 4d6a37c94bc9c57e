"""Answers from a server that speaks OpenAI's chat completions: Ollama, vLLM, `transformers serve`, …"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from stepladder.errors import ModelError
from stepladder.evaluation import shared_out
from stepladder.evaluation.generate import Answer, Message

AT_ONCE, TRIES, PAUSE = 4, 3, 1.0  # requests in flight; tries a request; seconds before the second, doubled after
MOST = 10_000_000  # bytes of an answer; a chat completion has thousands
BUSY = {408, 425, 429, 500, 502, 503, 504}  # what may be otherwise on the next try


class Endpoint(NamedTuple):
    """`url` as its maker gives it, with or without `/v1`; `timeout` in seconds, of each try."""

    url: str
    model: str
    timeout: float = 60.0

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"


def probe(endpoint: Endpoint, messages: list[Message]) -> None:
    """Ask for one token: is it there, does it have the model, does it speak chat completions?

    Raises:
        ModelError: as `answers`.
    """
    _answer(endpoint, messages, 1)


def answers(endpoint: Endpoint, conversations: list[list[Message]], max_new_tokens: int) -> list[Answer]:
    """The server's next turn for each conversation, in their order, at temperature 0; the ranks share them out.

    Raises:
        ModelError: it is down, too slow or refuses, after all tries; it answers what is no chat completion.
    """

    def batch_of(batch: list[list[Message]]) -> list[Answer]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda messages: _answer(endpoint, messages, max_new_tokens), batch))

    batches = [conversations[start : start + AT_ONCE] for start in range(0, len(conversations), AT_ONCE)]
    return [answer for batch in shared_out.each(batches, batch_of) for answer in batch]


def _answer(endpoint: Endpoint, messages: list[Message], max_new_tokens: int) -> Answer:
    asked = {"model": endpoint.model, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0, "seed": 42}
    said = _post(endpoint, asked)
    try:
        choice = json.loads(said)["choices"][0]
        return Answer(choice["message"]["content"].strip(), choice.get("finish_reason") == "stop")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ModelError(
            f"the endpoint {endpoint.url} answers what is no chat completion",
            why=f"it says: {said[:200].decode(errors='replace')!r}",
            way_out="is this an OpenAI-compatible server? Ollama: http://localhost:11434, vLLM: http://localhost:8000",
        ) from None


def _post(endpoint: Endpoint, body: dict[str, Any]) -> bytes:
    address = endpoint.url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        host = (request.host or "").encode("idna")  # what the connection does with it
    except ValueError:
        host = b""
    if not (host and request.type in ("http", "https")):
        raise ModelError(f"'{endpoint.url}' is no address", way_out="--endpoint http://localhost:11434")
    for number in range(TRIES):
        time.sleep(PAUSE * (2**number - 1))
        try:
            with urllib.request.urlopen(request, timeout=endpoint.timeout) as reply:
                return _whole(reply, endpoint.timeout)
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}: {error.read()[:200].decode(errors='replace')}"
            if error.code not in BUSY:
                break
        except (OSError, http.client.HTTPException) as error:  # no connection, or none in time
            why = str(getattr(error, "reason", "") or error or type(error).__name__)
    raise ModelError(
        f"the endpoint {endpoint.url} gives no answer",
        why=f"{why} (try {number + 1} of {TRIES}, {endpoint.timeout:g} s each)",
        way_out=f"is it running, and does it have the model '{endpoint.model}'? --timeout SECONDS for a slow one",
    )


def _whole(reply: http.client.HTTPResponse, seconds: float) -> bytes:
    """All that a server says, within the time: urllib's timeout is of each read, and one byte a minute passes it."""
    ends, said = time.monotonic() + seconds, b""
    while part := reply.read1(65_536):
        said += part
        if len(said) > MOST:
            raise http.client.HTTPException(f"it says more than {MOST:,} bytes")
        if time.monotonic() > ends:
            raise TimeoutError("timed out in the middle of its answer")
    return said
