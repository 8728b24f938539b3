"""One request on a connection of its own, as one user's is, with the time of everything that comes back."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from array import array
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hasten.bench.load import answer
from hasten.bench.load.http import AnswerError, Response, shown
from hasten.bench.load.sse import Events
from hasten.errors import InputError

now = time.monotonic
BODY_BYTES = 1 << 20  # of an answer that is no stream: no list of models and no error's message is longer
GRACE_SECONDS = 1.0  # for the end of an answer after its [DONE]
PATH = re.compile(r"[!-~]*")
KEY = re.compile(r"[!-~]{1,4096}")


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server. `base` is the path that endpoints follow, /v1 unless the URL says more."""

    host: str
    port: int
    base: str = "/v1"
    tls: ssl.SSLContext | None = None
    key: str | None = field(default=None, repr=False)
    address: str = ""
    """Where the host was found: looked up once, so that no request waits for it."""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.base}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "User-Agent: hasten-bench-serve",
            "Accept: text/event-stream, application/json",
            "Accept-Encoding: identity",
            "Connection: close",
        ]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def parse_url(url: str, key: str | None = None) -> Target:
    """Raises InputError for what is no http or https URL of a server, and for a key that no header can hold."""
    example = "for example http://127.0.0.1:8000 or https://host/v1"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
        host = host.encode("idna").decode("ascii") if host and not host.isascii() else host
    except ValueError as error:
        raise InputError(f"{url!r} is no URL: {error}", example) from None
    if parts.scheme not in ("http", "https") or not host or not PATH.fullmatch(parts.path + host):
        raise InputError(f"{url!r} is no http or https URL", example)
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise InputError(f"{url!r} holds more than host, port and path", f"{example}; --api-key-env names a key")
    base = parts.path.rstrip("/")
    if base.endswith("/completions"):
        raise InputError(f"{url!r} names an endpoint", "give what stands before it; --chat chooses chat completions")
    if not re.search(r"/v\d+[a-z0-9]*$", base):
        base += "/v1"
    if key is not None and not KEY.fullmatch(key):
        raise InputError("the API key is empty or holds characters that no header can")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    return Target(host, port or (443 if tls else 80), base, tls, key)


@dataclass(slots=True)
class Record:
    """One request's story. Times are seconds of the monotonic clock."""

    number: int
    prompt: int
    """Tokens asked for, as `new`; what the server counted is in `usage`."""
    new: int
    scheduled: float | None = None
    started: float = 0.0
    connected: float | None = None
    chunks: array[float] = field(default_factory=lambda: array("d"))
    """When each chunk with text arrived."""
    finished: float | None = None
    outcome: str = "unfinished"
    """completed; refused (429, or 503 with Retry-After); failed; unfinished."""
    status: int = 0
    error: str = ""
    """What went wrong, in few words that are the same for the same fault."""
    detail: str = ""
    retry_after: float | None = None
    usage: answer.Usage | None = None
    finish_reason: str | None = None

    def fail(self, error: str, detail: str = "", outcome: str = "failed") -> None:
        if self.outcome == "unfinished":
            self.outcome, self.error, self.detail = outcome, error, detail
            self.finished = now()


class Exchange(asyncio.Protocol):
    """Sends a request and reads its answer in the moment that bytes arrive. `over` is done when there is no more."""

    def __init__(self, request: bytes, record: Record, stream: bool = True) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.body = bytearray()  # of an answer that is no stream
        self._request, self._record, self._stream = request, record, stream
        self._response, self._events = Response(), Events()
        self._transport: asyncio.Transport | None = None
        self._grace: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._record.connected = now()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.over.done():
            return
        at = now()
        try:
            body = self._response.feed(data)
            self._record.status = self._response.status
            if self._response.begun:
                self._read(body, at)
            if self._response.complete:
                self._end(at)
        except AnswerError as error:
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        if self.over.done():
            return
        at = now()
        try:
            self._response.end()
            self._end(at)
        except AnswerError as wrong:
            if not self._record.finished:
                self._record.fail("disconnected", shown(str(error or wrong)))
            self._close()

    def abort(self) -> None:
        if self._grace:
            self._grace.cancel()
        if self._transport:
            self._transport.abort()

    def _read(self, body: bytes, at: float) -> None:
        if not self._stream or self._response.status != 200:
            self.body += body
            if len(self.body) > BODY_BYTES:
                self._end(at)
            return
        content = self._response.headers.get("content-type", "")
        if not content.lower().startswith("text/event-stream"):
            raise AnswerError(f"content-type is {shown(content) or 'missing'}, not text/event-stream")
        for event in self._events.feed(body):
            self._event(event, at)

    def _event(self, event: bytes, at: float) -> None:
        record = self._record
        if record.finished:
            return
        if event == answer.DONE:
            record.finished, record.outcome = at, "completed"
            self._grace = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._close)
            return
        chunk = answer.parse(event)
        if chunk.output:
            record.chunks.append(at)
        record.finish_reason = chunk.finish_reason or record.finish_reason
        record.usage = chunk.usage or record.usage
        if chunk.usage and chunk.usage.completion_tokens > record.new:
            raise AnswerError(f"completion_tokens is {chunk.usage.completion_tokens}, max_tokens was {record.new}")

    def _end(self, at: float) -> None:
        """The answer is complete."""
        record, status = self._record, self._response.status
        if status != 200:
            self._refuse(status)
        elif not self._stream:
            record.finished, record.outcome = at, "completed"
        elif not record.finished:
            record.fail("cut short", "the stream ended without [DONE]")
        self._close()

    def _refuse(self, status: int) -> None:
        wait = self._response.headers.get("retry-after", "")
        self._record.retry_after = float(wait) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", wait, re.ASCII) else None
        try:
            detail = answer.message(answer.parse_object(bytes(self.body), "the body"))
        except AnswerError:
            detail = shown(bytes(self.body), 200)
        refused = status == 429 or (status == 503 and bool(wait))
        self._record.fail(f"HTTP {status}", detail, "refused" if refused else "failed")

    def _fail(self, error: AnswerError) -> None:
        text = str(error)
        within = text.startswith("an error within the stream")
        self._record.fail("error in stream" if within else "malformed answer", text)
        self._close()

    def _close(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def send(target: Target, request: bytes, record: Record, timeout: float, stream: bool = True) -> bytes:
    """One request to its end, into `record`: nothing that the server does raises. Returns a body that is no stream."""
    exchange = Exchange(request, record, stream)
    record.started = now()
    name = target.host if target.tls else None
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().create_connection(
                lambda: exchange, target.address or target.host, target.port, ssl=target.tls, server_hostname=name
            )
            await exchange.over
    except TimeoutError:
        record.fail("timeout", f"no end after {timeout:g} s")
    except OSError as error:  # ssl.SSLError is one
        record.fail("no connection", shown(str(error), 200))
    finally:
        exchange.abort()
    return bytes(exchange.body)


async def locate(target: Target) -> str:
    """The first of the host's addresses that takes a connection. Raises InputError where none does."""
    reason = ""
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        for address in dict.fromkeys(str(entry[4][0]) for entry in found):
            try:
                async with asyncio.timeout(10):
                    _, writer = await asyncio.open_connection(address, target.port)
                writer.close()
                return address
            except (OSError, TimeoutError) as error:
                reason = getattr(error, "strerror", None) or str(error) or "no answer within 10 s"
    except OSError as error:
        reason = error.strerror or str(error)
    raise InputError(f"nothing answers at {target.url}: {shown(reason)}", "is the server up, and the port right?")


async def first_model(target: Target) -> str:
    """The name of the first model that /models lists. Raises InputError where the server does not say."""
    record = Record(0, 0, 0)
    body = await send(target, target.request("GET", "/models"), record, timeout=30, stream=False)
    hint = "--model NAME says which"
    if record.outcome != "completed":
        if record.status in (401, 403):
            hint = "--api-key-env NAME names the environment variable that holds the key"
        if not record.status:
            hint = "is it the right URL, and http or https?"
        raise InputError(f"{target.url}/models: {record.error}: {record.detail}", hint)
    try:
        models = answer.parse_object(body, "its answer").get("data")
    except AnswerError as error:
        raise InputError(f"{target.url}/models: {error}", hint) from None
    named = (
        [m["id"] for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)]
        if (isinstance(models, list))
        else []
    )
    if not named or not named[0]:
        raise InputError(f"{target.url}/models lists no model", hint)
    return str(named[0])
