"""Answers from a server that speaks OpenAI's chat completions: Ollama, vLLM, `transformers serve`, …"""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.errors import ModelError, RunError
from stepladder.evaluation import questions
from stepladder.evaluation.generation import parallel_map
from stepladder.evaluation.questions import Answer, Message

if TYPE_CHECKING:
    from httpx2 import URL, AsyncClient, Response

AT_ONCE, TRIES, PAUSE = 4, 3, 1.0  # requests in flight; tries a request; seconds before the second, doubled after
MOST = 10_000_000  # bytes of an answer; a chat completion has thousands
MOST_OF_A_FAULT = 2_000  # bytes that are read of a refusal, of which 200 are shown
BUSY = {408, 425, 429, 500, 502, 503, 504}  # what may be otherwise on the next try
KEY_VARIABLE = "OPENAI_API_KEY"
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which no file can hold; JSON can


class Endpoint(NamedTuple):
    """`url` as its maker gives it, with or without `/v1`; `timeout` in seconds, of each try."""

    url: str
    model: str
    timeout: float = 60.0

    def __str__(self) -> str:
        return f"{self.model} at {redact(self.url)}"


class Kept:
    """The answers of a server in a file, a transcript, while a comparison is under way: one that failed goes on there.

    Args:
        file: each answer is appended as it comes, by all ranks; None keeps nothing.
    """

    def __init__(self, file: Path | None, endpoint: Endpoint, max_new_tokens: int):
        self.file, self.endpoint, self.max_new_tokens = file, endpoint, max_new_tokens
        content = file.read_bytes() if file and file.is_file() else b""
        self.ending = b"" if content.endswith(b"\n") or not content else b"\n"  # of a line that was cut
        self.known = {key: answer for line in content.split(b"\n") for key, answer in self._read(line)}

    def _read(self, line: bytes) -> list[tuple[str, Answer]]:
        """An answer of this server's model within as many tokens; none in another's row or a half-written line."""
        try:
            row = json.loads(line)
            *asked, said = row["messages"]
            if (row["model"], row["max_new_tokens"]) == (str(self.endpoint), self.max_new_tokens):
                return [(json.dumps(asked), Answer(str(said["content"]), bool(row["stopped"])))]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return []

    def add(self, messages: list[Message], answer: Answer) -> None:
        if self.file:
            row = questions.transcript_row(str(self.endpoint), {"messages": messages}, answer, self.max_new_tokens, 0.0)
            try:
                with self.file.open("ab") as out:
                    out.write(self.ending + row.encode(errors="surrogatepass"))
            except OSError as error:
                raise RunError(f"{self.file} cannot be written: {error.strerror}") from None
            self.ending = b""

    def remove(self) -> None:
        """The comparison is made: the next one asks anew."""
        if self.file:
            self.file.unlink(missing_ok=True)


def redact(url: str) -> str:
    """An address as it may be printed: without a password or a key that stands in it."""
    plain = re.sub(r"^(\w+://)?.*@", r"\1…@", url, flags=re.DOTALL)
    return re.sub(r"[?#].*", "?…", plain, flags=re.DOTALL)


def probe(endpoint: Endpoint, messages: list[Message]) -> None:
    """Ask for one token: is it there, does it have the model, does it speak chat completions?

    Raises:
        ModelError: as `answers`.
    """
    asyncio.run(_ask_all(endpoint, [messages], Kept(None, endpoint, 1)))


def answers(
    endpoint: Endpoint,
    conversations: list[list[Message]],
    max_new_tokens: int,
    kept: Kept | None = None,
    notes: list[str] | None = None,
) -> list[Answer]:
    """The server's next turn for each conversation, in their order, at temperature 0; the ranks share them out.

    Args:
        kept: what the server answered before is not asked again.
        notes: a note is added where an answer holds halves of characters.

    Raises:
        ModelError: it is down, too slow or refuses, after all tries; it answers what is no chat completion.
    """
    kept = kept or Kept(None, endpoint, max_new_tokens)
    batches = [conversations[start : start + AT_ONCE] for start in range(0, len(conversations), AT_ONCE)]
    try:
        asked = parallel_map(batches, lambda batch: asyncio.run(_ask_all(endpoint, batch, kept)))
    except ModelError as error:
        if not (kept.file and kept.file.is_file()):
            raise
        help = f"{error.help}\nwhat it answered is kept in {kept.file}: the same command again goes on from there"
        raise ModelError(error.what, why=error.why, help=help) from None
    found = [answer for batch in asked for answer in batch]
    if notes is not None and any("\ufffd" in answer.text for answer in found):
        notes.append(f"{endpoint} answers with halves of characters (lone surrogates), which are compared as \ufffd")
    return found


async def _ask_all(endpoint: Endpoint, conversations: list[list[Message]], kept: Kept) -> list[Answer]:
    """All of them at once; the first fault is raised when the others have answered, so that none is lost."""
    import httpx2

    address, headers = _address(endpoint), _headers()
    try:
        # No time limits of its own, which count from byte to byte: `_post` has one of all. A redirect is not followed:
        # it would hand the key and the questions on.
        client = httpx2.AsyncClient(headers=headers, timeout=None, follow_redirects=False)
    except (ImportError, ValueError) as error:  # of a proxy in the environment
        raise ModelError(
            "the proxy of the environment cannot be used", why=str(error), help="unset HTTP_PROXY, ALL_PROXY, …"
        ) from None
    async with client:

        async def ask(messages: list[Message]) -> Answer:
            if known := kept.known.get(json.dumps(messages)):
                return known
            body = {"model": endpoint.model, "messages": messages, "max_tokens": kept.max_new_tokens}
            answer = _read(endpoint, await _post(client, address, endpoint, body | {"temperature": 0, "seed": 42}))
            kept.add(messages, answer)
            return answer

        found = await asyncio.gather(*map(ask, conversations), return_exceptions=True)
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in found if isinstance(answer, Answer)]


def _read(endpoint: Endpoint, said: bytes) -> Answer:
    """The answer of a chat completion.

    Raises:
        ModelError: it is none.
    """
    try:
        choice = json.loads(said)["choices"][0]
        text, stopped = choice["message"]["content"].strip(), choice.get("finish_reason") == "stop"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ModelError(
            f"the endpoint {redact(endpoint.url)} answers what is no chat completion",
            why=f"it says: {_excerpt(said)!r}",
            help="is this an OpenAI-compatible server? Ollama: http://localhost:11434, vLLM: http://localhost:8000",
        ) from None
    return Answer(HALF.sub("\ufffd", text), stopped)


def _address(endpoint: Endpoint) -> URL:
    """Where chat completions are asked for.

    Raises:
        ModelError: it is no address, or holds a secret, which would be printed and kept with the command.
    """
    import httpx2

    try:
        url = httpx2.URL(endpoint.url)
        url.host.encode("idna")  # what the connection does with it, in words of its own
        right = url.scheme in ("http", "https") and url.raw_host and 0 < (url.port or 80) < 65_536
    except (httpx2.InvalidURL, ValueError, TypeError):
        right = False
    if "@" in endpoint.url or "?" in endpoint.url or "#" in endpoint.url:
        raise ModelError(
            f"--endpoint {redact(endpoint.url)} holds more than an address",
            why="a password or a key in it would be kept in compare.json, with the command",
            help=f"the server's address alone; a key goes into the environment: {KEY_VARIABLE}",
        )
    if not right:
        raise ModelError(f"'{redact(endpoint.url)}' is no address", help="--endpoint http://localhost:11434")
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions")


def _headers() -> dict[str, str]:
    # Not packed: a megabyte of zeros unpacks from a kilobyte.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise ModelError(
                f"{KEY_VARIABLE} holds characters that no key has", help=f"set {KEY_VARIABLE} again, or unset it"
            )
        headers["Authorization"] = f"Bearer {key}"
    return headers


async def _post(client: AsyncClient, address: URL, endpoint: Endpoint, body: dict[str, Any]) -> bytes:
    """What the server says to this, after as many tries as it takes.

    Raises:
        ModelError: it says no, or nothing, or too much, or sends us elsewhere.
    """
    import httpx2

    help = f"is it running, and does it have the model '{endpoint.model}'? --timeout SECONDS for a slow one"
    said = json.dumps(body).encode()
    for number in range(TRIES):
        await asyncio.sleep(PAUSE * (2**number - 1))
        try:
            async with asyncio.timeout(endpoint.timeout), client.stream("POST", address, content=said) as reply:
                if reply.is_success:
                    return await _whole(reply)
                why = f"HTTP {reply.status_code}: {_excerpt(await _whole(reply, MOST_OF_A_FAULT))}"
            if reply.is_redirect:
                there = redact(reply.headers.get("location", "")).removesuffix("/v1/chat/completions")
                why = f"HTTP {reply.status_code}: it sends us to {there!r}, where neither key nor questions are sent"
                help = "--endpoint with the address that it moved to, if you trust that"
            if reply.status_code not in BUSY:
                break
        except TimeoutError:
            why = "timed out"
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, ValueError) as error:
            why = str(error) or type(error).__name__
    raise ModelError(
        f"the endpoint {redact(endpoint.url)} gives no answer",
        why=f"{why} (try {number + 1} of {TRIES}, {endpoint.timeout:g} s each)",
        help=help,
    )


async def _whole(reply: Response, begins: int = 0) -> bytes:
    """All that a server says, as it was sent; or how it begins, in as many bytes.

    Raises:
        ValueError: it says too much.
    """
    said = bytearray()
    async for part in reply.aiter_raw():
        said += part
        if begins and len(said) >= begins:
            break
        if len(said) > MOST:
            raise ValueError(f"it says more than {MOST:,} bytes")
    return bytes(said)


def _excerpt(said: bytes) -> str:
    """How it begins, without our key: some servers repeat it in their refusal."""
    text = said[:MOST_OF_A_FAULT].decode(errors="replace")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return (text.replace(key, "…") if key else text)[:200]
