"""Attacks on what stands before the routes: keys and the ways around them, and requests that two readers read apart."""

from __future__ import annotations

import hmac
import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from server.serving import Server, eventually, serve

from hasten import LLM
from hasten.server import middleware
from hasten.server.config import HttpLimits

KEYS = ("first-key", "second-key", "third-key")


@pytest.fixture(scope="module")
def guarded(llm: LLM) -> Iterator[Server]:
    with serve(llm, keys=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def open_to_all(llm: LLM) -> Iterator[Server]:
    with serve(llm, limits=HttpLimits(body=100_000)) as running:
        yield running
        eventually(running.idle)
        assert running.service.stats.faults == 0


def exchange(server: Server, sent: bytes, patience: float = 0.5) -> list[tuple[int, bytes]]:
    """(status, all that follows it) of every answer to exactly these bytes."""
    with closing(socket.create_connection(server.address, timeout=10)) as connection:
        with suppress(OSError):  # refused before all of it was sent
            connection.sendall(sent)
        made = b""
        with suppress(OSError):
            while more := connection.recv(65536):
                made += more
                connection.settimeout(patience)
    parts = re.split(rb"HTTP/1\.1 (\d{3}) ", made)
    return [(int(status), rest) for status, rest in zip(parts[1::2], parts[2::2], strict=True)]


def ask(method: str, target: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode(
        "latin-1"
    )


# --- keys


def test_keys_are_compared_in_constant_time(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """hmac.compare_digest alone decides, and it sees every key, also behind one that fits."""
    seen: list[tuple[Any, Any]] = []
    answer: list[Any] = [hmac.compare_digest]

    def compare(given: Any, key: Any) -> bool:
        seen.append((given, key))
        return bool(answer[0](given, key))

    monkeypatch.setattr(middleware, "hmac", SimpleNamespace(compare_digest=compare))
    for key in (*KEYS, "none-of-them"):
        seen.clear()
        status = guarded.get("/v1/models", Authorization=f"Bearer {key}").status_code
        assert status == (200 if key in KEYS else 401)
        assert seen == [(key.encode(), known.encode()) for known in KEYS]
    answer[0] = lambda *_: False
    assert guarded.get("/v1/models", Authorization="Bearer first-key").status_code == 401
    answer[0] = lambda *_: True
    assert guarded.get("/v1/models", Authorization="Bearer none-of-them").status_code == 200


def test_keys_that_are_not_ascii(llm: LLM) -> None:
    with serve(llm, keys=("schlüssel", "plain")) as server:
        for value, status in (
            ("Bearer schlüssel".encode(), 200),
            ("Bearer schlüssel".encode("latin-1"), 401),
            (b"Bearer plain", 200),
            (b"Bearer \xff\x00\xfe", 401),
            (b"Bearer " + b"\xc3\xbc" * 5000, 401),
            (b"Bearer ", 401),
            (b"Bearer", 401),
            (b"", 401),
            (b"Basic \xff\xff", 401),
        ):
            head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
            found = [s for s, _ in exchange(server, head)]
            assert found == [status] or (b"\x00" in value and found == [400]), value[:40]


def test_several_authorizations(guarded: Server) -> None:
    """A proxy that checks one of them and a server that reads another would be a way in."""
    good, bad = "Authorization: Bearer first-key", "Authorization: Bearer wrong"
    for pair in ((good, bad), (bad, good), (good, good), (good, "authorization: Bearer")):
        assert [s for s, _ in exchange(guarded, ask("GET", "/v1/models", *pair))] == [401]
    assert [s for s, _ in exchange(guarded, ask("GET", "/v1/models", good))] == [200]


TARGETS = [
    *("/", "/v1/models", "/v1/models/", "/v1/models/demo", "/v1/completions", "/v1/completions/", "/tokenize"),
    *("/metrics", "/metrics/", "/METRICS", "/Metrics", "/%6detrics", "/docs", "/redoc", "/openapi.json", "/admin"),
    *("//metrics", "/./metrics", "/health/", "/Health", "/HEALTH", "/healthz", "/health/metrics", "/health/../metrics"),
    *("/health/%2e%2e/metrics", "/health%2f..%2fmetrics", "/health%00", "/health;/metrics", "/metrics?/health"),
    *("/metrics#/health", "/metrics?path=/health", "//health", "/x/../health", "/health%20", "/health%23"),
    *("http://x/metrics", "http://x/health", "http://health/metrics", "*", "x:80"),
]


def test_every_route_but_health_is_behind_the_key(guarded: Server) -> None:
    for target in TARGETS:
        for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "TRACE", "CONNECT", "PATCH", "QUERY"):
            found = [s for s, _ in exchange(guarded, ask(method, target))]
            assert found in ([401], [400]), (method, target, found)
            assert found == [401] or not target.startswith("/"), (method, target)
    for target in ("/health", "/%68ealth", "/health?x=/metrics"):  # all three are /health itself
        ((status, text),) = exchange(guarded, ask("GET", target))
        assert status == 200
        assert b'"status":"serving"' in text


def test_a_wrong_key_is_told_from_none(guarded: Server) -> None:
    assert "is needed" in guarded.get("/v1/models").json()["error"]["message"]
    wrong = guarded.get("/v1/models", Authorization="Bearer wrong")
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (401, "this API key is not known")


def test_no_other_header_is_a_key(guarded: Server) -> None:
    for header in (
        *("X-Api-Key: first-key", "Api-Key: first-key", "Cookie: Authorization=Bearer first-key"),
        *("Proxy-Authorization: Bearer first-key", "X-Original-URL: /health", "X-Rewrite-URL: /health"),
        *("X-Forwarded-Path: /health", "X-HTTP-Method-Override: GET", "X-Forwarded-For: 127.0.0.1"),
        *("Authorization: Basic OmZpcnN0LWtleQ==", "Authorization: Bearer first-key, second-key"),
    ):
        assert [s for s, _ in exchange(guarded, ask("GET", "/metrics", header))] == [401], header
    assert [s for s, _ in exchange(guarded, ask("GET", "/metrics?api_key=first-key&key=first-key"))] == [401]


# --- requests that two readers read apart

BODY = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HIDDEN = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SIZE = b"Content-Length: %d\r\n" % len(BODY)
SMUGGLED = {
    "length, then chunked": HEAD + SIZE + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED + HIDDEN,
    "chunked, then length": HEAD + b"Transfer-Encoding: chunked\r\n" + SIZE + b"\r\n" + CHUNKED + HIDDEN,
    "two lengths": HEAD + SIZE + b"Content-Length: 3\r\n\r\n" + BODY + HIDDEN,
    "a list of lengths": HEAD + b"Content-Length: %d, 3\r\n\r\n" % len(BODY) + BODY + HIDDEN,
    "a length with a sign": HEAD + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY + HIDDEN,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY + HIDDEN,
    "a length in hexadecimal": HEAD + b"Content-Length: 0x1f\r\n\r\n" + BODY + HIDDEN,
    "a length of Arabic digits": HEAD + "Content-Length: ٣\r\n\r\n".encode() + BODY + HIDDEN,
    "a space before the colon": HEAD + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY + HIDDEN,
    "another encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED + HIDDEN,
    "two encodings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED + HIDDEN,
    "encodings in a list": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED + HIDDEN,
    "a folded header": HEAD + b"X: a\r\n Transfer-Encoding: chunked\r\n" + SIZE + b"\r\n" + BODY,
    "a null in a header": HEAD + b"X: a\x00b\r\n" + SIZE + b"\r\n" + BODY + HIDDEN,
    "a null in a name": HEAD + b"X\x00: b\r\n" + SIZE + b"\r\n" + BODY + HIDDEN,
    "a null in the target": b"GET /metr\x00ics HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
    "a bare return": HEAD + b"X: a\rContent-Length: 0\r\n" + SIZE + b"\r\n" + BODY + HIDDEN,
    "a chunk's size that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n" + HIDDEN,
    "a chunk's size beyond 64 bits": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"f" * 40
    + b"\r\nhello\r\n0\r\n\r\n"
    + HIDDEN,
    "a chunk longer than said": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n" + HIDDEN,
    "no host": b"GET /metrics HTTP/1.1\r\n\r\n" + HIDDEN,
    "two hosts": b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + HIDDEN,
    "HTTP/0.9": b"GET /metrics\r\n\r\n" + HIDDEN,
}


@pytest.mark.parametrize("how", SMUGGLED)
def test_request_smuggling(open_to_all: Server, how: str) -> None:
    """What two readers could read apart is refused, and nothing after it on that connection is believed."""
    found = exchange(open_to_all, SMUGGLED[how])
    if how == "a folded header":  # obsolete, but every reader makes one header of it
        assert [status for status, _ in found] in ([200], [400])
    else:
        assert [status for status, _ in found] in ([400], []), found
    assert b"hasten_healthy" not in b"".join(text for _, text in found)
    eventually(open_to_all.idle)


def test_a_line_that_ends_in_a_bare_newline_hides_nothing(open_to_all: Server) -> None:
    sent = b"GET /health HTTP/1.1\nHost: x\nConnection: close\n\nGET /metrics HTTP/1.1\nHost: x\n\n"
    found = exchange(open_to_all, sent)
    assert [status for status, _ in found] in ([200], [400])
    assert b"hasten_healthy" not in found[0][1]


def test_a_flood_of_chunk_extensions(open_to_all: Server) -> None:
    start = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(open_to_all, start + b"1;" + b"a" * 1_000_000 + b"\r\n{\r\n")[0][0] == 400
    many = b"".join(b"1;x=%s\r\n \r\n" % (b"a" * 500) for _ in range(3000))
    whole = many + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert exchange(open_to_all, start + whole, 30)[0][0] in (200, 400, 413)
    trailers = CHUNKED[:-2] + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n"
    assert exchange(open_to_all, start + trailers, 5)[0][0] in (200, 400)
    eventually(open_to_all.idle)


def test_giant_headers(open_to_all: Server) -> None:
    for head in (
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"A" * 1_000_000 + b" /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X" * 1_000_000 + b": y\r\n\r\n",
    ):
        assert [status for status, _ in exchange(open_to_all, head)] in ([400], []), head[:40]
    for length in (b"9" * 19, b"9" * 400, b"100001"):
        found = exchange(open_to_all, HEAD + b"Content-Length: " + length + b"\r\n\r\n" + BODY)
        assert found[0][0] in (400, 413), length
    assert open_to_all.get("/health").status_code == 200
