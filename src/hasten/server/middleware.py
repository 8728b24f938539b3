"""Before any route: who asks, how much they send, how many ask at once, and how long they may leave answers unread."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections import Counter

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.server.config import Config
from hasten.server.errors import RequestError
from hasten.server.streams import error_response

OPEN_PATHS = ("/health",)
PAGE = "/"


def host_name(value: str) -> str:
    """A Host header's name, without its port: in lower case, an IPv6 address without its brackets."""
    name = value.rpartition("]")[0].removeprefix("[") if value.startswith("[") else value.partition(":")[0]
    return name.strip().lower()


class Guard:
    """Counts answers by route and status in `answers`."""

    def __init__(self, app: ASGIApp, config: Config, answers: Counter[tuple[str, int]]) -> None:
        self._app = app
        self._limits, self._hosts = config.limits, config.hosts
        self._keys = [key.encode() for key in config.api_keys]
        self._answers = answers
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(self._limits.write_seconds):
                await send(message)

        self._requests += 1
        try:
            refusal = self._refusal(scope)
            if refusal:
                await error_response(refusal)(scope, receive, counted)
            else:
                await self._app(scope, self._bounded(receive), counted)
        finally:
            self._requests -= 1
            route = scope.get("route")
            self._answers[getattr(route, "path", "other"), status] += 1

    def _refusal(self, scope: Scope) -> RequestError | None:
        path, headers = scope["path"], Request(scope).headers
        # Another site's page can have its own name resolve to this machine: then it is of one origin with the server.
        if self._hosts and (host := host_name(headers.get("host", ""))) not in self._hosts:
            return RequestError(f"this server is not called '{host[:100]}'", "host", status=403, code="unknown_host")
        if path in OPEN_PATHS:
            return None
        shown = headers.getlist("authorization")
        if self._keys and not self._known(shown, page=path == PAGE):
            challenge = 'Basic realm="hasten", charset="UTF-8"' if path == PAGE else "Bearer"
            return RequestError(
                "this API key is not known" if shown else "an API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )
        if self._requests > self._limits.requests:
            return RequestError(
                f"more than {self._limits.requests} requests at once",
                status=429,
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        if "transfer-encoding" in headers and "content-length" in headers:  # RFC 9112, 6.1: two readers may differ
            message = "transfer-encoding and content-length are both given"
            return RequestError(message, "content-length", headers={"Connection": "close"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:19]) > self._limits.body:
            return self._too_large()
        return None

    def _known(self, authorizations: list[str], page: bool) -> bool:
        """Whether a key is among ours; all are compared, each in constant time. Of several headers none counts: a
        proxy may have read another one.

        A browser that opens the page has no way to send a bearer's key: there, and only there, it may be the password
        of basic authentication. Other sites could make a browser send that one too.
        """
        if len(authorizations) != 1:
            return False
        scheme, _, value = authorizations[0].partition(" ")
        given = value.strip().encode("latin-1", "replace")
        if page and scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)

    def _too_large(self) -> RequestError:
        message = f"the body is larger than {self._limits.body} bytes"
        return RequestError(message, status=413, code="body_too_large", headers={"Connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        """A body that names no length is counted as it comes."""
        total = 0

        async def bounded() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._limits.body:
                raise self._too_large()
            return message

        return bounded
