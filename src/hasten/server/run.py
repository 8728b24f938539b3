"""Serving on a socket: silent connections are closed, and a signal lets what runs end before the server does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from hasten.errors import InputError
from hasten.server.app import Context
from hasten.server.errors import RequestError
from hasten.server.service import SWITCH_SECONDS, Service
from hasten.server.streams import encoded

log = logging.getLogger("hasten.server")
HEADER_BYTES = 32 << 10
HEADER_SECONDS = 15.0
FAREWELL_SECONDS = 3.0


class Protocol(H11Protocol):
    """A connection that must send its next request's headers in time, and finds no place among too many."""

    most_connections = 2048
    header_seconds = HEADER_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._idle():
            self._expect_headers()
        super().data_received(data)
        if not self._idle():
            self._headers_came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered like any other mistake, in one piece, and the connection ends."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is under way: nothing can be said
            body = encoded(RequestError(msg).document)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            events = (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body))
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in (*events, h11.EndOfMessage())))
        self.transport.close()

    def _idle(self) -> bool:
        """Between two requests, as far as headers go."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(self.header_seconds, self._give_up)

    def _headers_came(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._idle() and not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """The first signal drains, a second one ends at once. `serve` returns when all is over.

    What does not end within `drain_seconds` is told so, and has `FAREWELL_SECONDS` to be sent.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self.interrupted: int | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.get_running_loop().call_later(self._drain_seconds, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    def _give_up(self) -> None:
        log.warning("%d did not end within %g s", self._service.active, self._drain_seconds)
        self._service.end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # no other can have handlers
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.interrupted is not None:
            os._exit(128 + sig)
        self.interrupted = sig
        log.warning("ending: %d running; a second signal ends at once", self._service.active)
        self._service.refuse()
        self.should_exit = True


def make_server(app: FastAPI, drain_seconds: float) -> Server:
    """What serves `app` as soon as it is given sockets."""
    context: Context = app.state.context
    limits = context.config.limits
    Protocol.most_connections = limits.connections
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(drain_seconds + FAREWELL_SECONDS),
        backlog=1024,
    )
    return Server(config, context.service, drain_seconds)


def run(app: FastAPI, bound: socket.socket, drain_seconds: float) -> None:
    """Serve on a socket of `bind` until a signal."""
    context: Context = app.state.context
    server = make_server(app, drain_seconds)
    sys.setswitchinterval(SWITCH_SECONDS)
    _raise_file_limit(context.config.limits.connections + 256)
    address = bound.getsockname()
    print(f"serving {context.config.served.names[0]} at http://{_shown(address)}", file=sys.stderr, flush=True)
    try:
        server.run(sockets=[bound])
    finally:
        bound.close()
        context.service.stop()


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; port 0 for any free one. Raises InputError where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            made = undo.enter_context(socket.socket(family, kind, proto))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            undo.pop_all()
            return made
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen at {host}:{port}: {reason}", "--port 0 takes any free one") from None


def _shown(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _raise_file_limit(wanted: int) -> None:
    """A connection is a file: as many as the system lets us have without being asked."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
