"""Answers on their way: server-sent events, and work that ends when its client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hasten.server.errors import RequestError, as_request_error
from hasten.server.ticket import Delta, Ticket, arrival

log = logging.getLogger("hasten.server")
T = TypeVar("T")
PIECE = 200
"""Entries of a list that are encoded at once: with 20 log-probabilities each, some milliseconds."""
GONE = 499
"""The status that is logged for a client that did not wait (nginx's number); nobody receives it."""


def encoded(document: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def encoded_apart(document: Any) -> bytes:
    """The same; of a large document on another thread, and in pieces: the library keeps all threads waiting in each."""
    if _entries(document) <= PIECE:
        return encoded(document)
    return await asyncio.to_thread(lambda: b"".join(_pieces(document)))


def _entries(value: Any, name: str = "") -> int:
    """How many there are in the lists of an answer."""
    if isinstance(value, dict):
        return sum(_entries(v, k) for k, v in value.items())
    if not isinstance(value, list):
        return 0
    return sum(map(_entries, value)) if name == "choices" else len(value)


def _pieces(value: Any, name: str = "") -> Iterator[bytes]:
    """What `encoded` makes of an answer, each piece of it soon made."""
    if isinstance(value, dict):
        yield b"{"
        for i, (key, inner) in enumerate(value.items()):
            yield (b"," if i else b"") + encoded(key) + b":"
            yield from _pieces(inner, key)
        yield b"}"
    elif isinstance(value, list):
        yield b"["
        step = 1 if name == "choices" else PIECE
        for i in range(0, len(value), step):
            yield b"," if i else b""
            if name == "choices":
                yield from _pieces(value[i])
            else:
                yield encoded(value[i : i + step])[1:-1]
        yield b"]"
    else:
        yield encoded(value)


def event(encoded: bytes) -> bytes:
    return b"data: " + encoded + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else encoded(content)


def error_response(error: BaseException) -> Response:
    known = as_request_error(error)
    if known.code == "internal_error":
        log.error("a request failed", exc_info=error)
    return Json(known.document, known.status, known.headers)


class EventStream(Response):
    """Sends events as they come. The status waits for the first of them, so that what fails before it is no 200.

    `cancel` is called when all is over, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], cancel: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self._send(send), receive)
        finally:
            self._cancel()

    async def _send(self, send: Send) -> None:
        body = await anext(self._events)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            async for body in self._events:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception as error:
            if isinstance(error, TimeoutError | OSError):  # the client does not read, or is gone
                raise
            known = as_request_error(error)
            if known.code == "internal_error":
                log.error("a stream failed", exc_info=error)
            body = event(encoded(known.document)) + DONE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def answer(request: Request, tickets: list[Ticket], work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; where the client leaves before, its tickets are cancelled and RequestError is raised."""
    try:
        done, result = await _unless_gone(work, request.receive)
    finally:
        for ticket in tickets:
            ticket.cancel()
    if not done:
        raise RequestError("the client is gone", status=GONE)
    assert result is not None
    return result


async def _unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> tuple[bool, T | None]:
    """(True, what `work` returned), or (False, None) where the client left first, and the work was ended."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return (True, task.result()) if task.done() else (False, None)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(tickets: list[Ticket]) -> AsyncIterator[tuple[int, Delta]]:
    """(number of its ticket, delta) of several requests as they come, each in its turn.

    Nothing is taken before it is asked for: what a lagging reader has not read stays with the tickets, which join it.
    """
    left = dict(enumerate(tickets))
    while left:
        idle = True
        for number, ticket in list(left.items()):
            delta = ticket.take()
            if delta is not None:
                idle = False
                yield number, delta
            elif ticket.ended:
                del left[number]
        if idle and left:
            await arrival(list(left.values()))
