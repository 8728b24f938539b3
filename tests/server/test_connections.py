"""Clients that leave, dawdle, crowd, or have no key."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from server.serving import Server, eventually, serve

from hasten import LLM
from hasten.server import run
from hasten.server.config import HttpLimits

LONG = {"prompt": "def read", "max_tokens": 400, "ignore_eos": True}


def raw(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    if not any("chunked" in h for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.address, timeout=10)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    made = b""
    while True:
        try:
            more = connection.recv(65536)
        except ConnectionResetError:
            return made
        if not more:
            return made
        made += more


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first token", "amid"])
def test_a_client_that_leaves_is_not_worked_for(server: Server, stream: bool, when: str) -> None:
    server.program.open.clear()
    with closing(connect(server)) as connection:
        connection.sendall(raw("/v1/completions", json.dumps({**LONG, "n": 3, "stream": stream}).encode()))
        eventually(lambda: server.service.active == 3)
        if when == "amid":
            server.program.open.set()
            eventually(lambda: server.service.stats.generated_tokens > 3)
    server.program.open.set()
    eventually(server.idle)
    assert server.service.stats.finished["abort"] == 3
    assert server.service.stats.generated_tokens < 1200


def test_one_that_leaves_takes_nobody_with_it(server: Server) -> None:
    expected = server.post("/v1/completions", {**LONG, "seed": 1}).json()["choices"][0]["text"]
    with server.client.stream("POST", "/v1/completions", json={**LONG, "seed": 1, "stream": True}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        with closing(connect(server)) as connection:
            connection.sendall(raw("/v1/completions", json.dumps({**LONG, "n": 2}).encode()))
            eventually(lambda: server.service.active == 3 or server.service.active == 0)
        events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    assert "".join(e["choices"][0]["text"] for e in events) == expected
    eventually(server.idle)


def test_a_body_without_a_length_is_counted(llm: LLM) -> None:
    with serve(llm, limits=HttpLimits(body=1000)) as server:
        for size, status in ((900, b" 200 "), (1100, b" 413 "), (100_000, b" 413 ")):
            body = json.dumps({"prompt": "x", "max_tokens": 1, "user": "u" * (size - 60)}).encode()
            chunks = b"".join(
                b"%x\r\n%s\r\n" % (len(p), p) for p in (body[i : i + 300] for i in range(0, len(body), 300))
            )
            with closing(connect(server)) as connection:
                with suppress(OSError):  # refused before all of it was sent
                    connection.sendall(raw("/v1/completions", chunks + b"0\r\n\r\n", "Transfer-Encoding: chunked"))
                assert status in connection.recv(65536).split(b"\r\n")[0]
        answer = server.post("/v1/completions", {"prompt": "x" * 1100})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert server.service.active == 0


def test_a_body_that_does_not_come(llm: LLM) -> None:
    with serve(llm, limits=HttpLimits(body_seconds=0.3)) as server, closing(connect(server)) as connection:
        head = raw("/v1/completions", b"{}")[:-2].replace(b"Content-Length: 2", b"Content-Length: 50")
        connection.sendall(head)
        started = time.monotonic()
        while time.monotonic() - started < 0.25:
            connection.sendall(b" ")  # a byte now and then does not prolong it
            time.sleep(0.05)
        assert b" 408 " in rest(connection)


def test_headers_that_do_not_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Protocol, "header_seconds", 0.3)
    slow, silent = connect(server), connect(server)
    with closing(slow), closing(silent):
        started = time.monotonic()
        for byte in b"GET /health HTTP/1.1\r\nX: y":
            try:
                slow.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.02)
        assert rest(slow) == rest(silent) == b""
        assert time.monotonic() - started < 5
        with closing(connect(server)) as kept:  # and the second request of a connection is held to it too
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += kept.recv(65536)
            kept.sendall(b"GET /hea")
            assert rest(kept) == b""


def test_giant_headers(server: Server) -> None:
    with closing(connect(server)) as connection:
        with suppress(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000)
        answer = rest(connection)
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\x00" * 100])
def test_what_is_no_http(server: Server, garbage: bytes) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in rest(connection)
    assert server.get("/health").status_code == 200


def test_five_hundred_idle_connections_and_a_limit_on_them(llm: LLM) -> None:
    with serve(llm, limits=HttpLimits(connections=300)) as server:
        crowd = [connect(server) for _ in range(500)]
        try:
            closed = 0
            for connection in crowd:
                connection.settimeout(0.001)
                try:
                    closed += connection.recv(1) == b""
                except ConnectionResetError:
                    closed += 1
                except TimeoutError:
                    pass
            assert closed >= 190
        finally:
            for connection in crowd:
                connection.close()
        eventually(lambda: len(server.uvicorn.server_state.connections) < 10)
        assert server.get("/health").status_code == 200


def test_more_requests_at_once_than_allowed(llm: LLM) -> None:
    with serve(llm, limits=HttpLimits(requests=2)) as server:
        server.program.open.clear()
        held = [connect(server) for _ in range(2)]
        for connection in held:
            connection.sendall(raw("/v1/completions", json.dumps(LONG).encode()))
        eventually(lambda: server.service.active == 2)
        answer = server.get("/v1/models")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert server.get("/health").status_code == 200
        for connection in held:
            connection.close()
        server.program.open.set()
        eventually(server.idle)
        assert server.get("/v1/models").status_code == 200


def test_a_client_that_reads_nothing_is_let_go(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer fills the buffers; after `write_seconds` of that it is cancelled like one that left."""
    with (
        serve(llm, limits=HttpLimits(write_seconds=0.3, logprobs=20)) as server,
        closing(socket.socket()) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        body = {**LONG, "n": 8, "logprobs": 20, "stream": True, "max_tokens": 480}
        connection.sendall(raw("/v1/completions", json.dumps(body).encode()))
        eventually(lambda: server.service.stats.generated_tokens > 10)
        eventually(server.idle, 30)
        eventually(lambda: not server.uvicorn.server_state.tasks, 10)


class TestKeys:
    @pytest.fixture
    def guarded(self, llm: LLM) -> Iterator[Server]:
        with serve(llm, keys=("first-key", "second-key")) as running:
            yield running

    def test_every_route_but_health(self, guarded: Server) -> None:
        paths = [route.path for route in guarded.app.routes] + ["/nothing", "/openapi.json"]
        for path in set(paths):
            for method in ("GET", "POST", "OPTIONS", "DELETE"):
                status = guarded.client.request(method, path).status_code
                assert (status == 401) == (path != "/health"), (method, path, status)

    @pytest.mark.parametrize(
        ("header", "status"),
        [
            ("Bearer first-key", 200),
            ("Bearer second-key", 200),
            ("bearer second-key", 200),
            ("Bearer first-ke", 401),
            ("Bearer first-key-", 401),
            ("Bearer first-key,second-key", 401),
            ("first-key", 401),
            ("Basic " + base64.b64encode(b"x:first-key").decode(), 401),
            ("Bearer \xff\xfe", 401),
        ],
    )
    def test_keys(self, guarded: Server, header: str, status: int) -> None:
        answer = guarded.client.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "first-key" not in answer.text

    def test_the_page_takes_a_key_as_a_password(self, guarded: Server) -> None:
        assert guarded.get("/").headers["www-authenticate"].startswith("Basic ")
        assert guarded.client.get("/", auth=("anybody", "second-key")).status_code == 200
        assert guarded.client.get("/", auth=("anybody", "wrong")).status_code == 401
        assert guarded.get("/", Authorization="Basic %%%").status_code == 401

    def test_a_body_is_not_read_before_the_key(self, guarded: Server) -> None:
        with closing(connect(guarded)) as connection:
            connection.sendall(raw("/v1/completions", b"{}")[:-1])  # one byte is missing, and never comes
            assert b" 401 " in connection.recv(65536)
