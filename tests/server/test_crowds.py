"""Many clients that behave badly at once: they leave, dawdle, or only sit there. Others are served; nothing is kept."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import pytest
from server.serving import Server, eventually, serve

from hasten import LLM
from hasten.server import run
from hasten.server.config import HttpLimits

ASK = {"prompt": "def read", "max_tokens": 8, "seed": 3}
LONG = {"prompt": "def read", "max_tokens": 400, "ignore_eos": True}
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what is asked here")


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    with serve(llm) as running:
        yield running
        assert running.service.stats.faults == 0


def request(path: str, body: bytes, *, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body) if length is None else length}\r\n\r\n".encode() + body


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.address, timeout=30)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@LINUX
def test_many_that_vanish_amid_their_streams(server: Server) -> None:
    """Rounds of them, after the first of which neither memory nor descriptors grow; every block is free in between."""
    body = request("/v1/completions", json.dumps({**LONG, "n": 2, "stream": True}).encode())
    expected = server.post("/v1/completions", ASK).json()["choices"]
    levels = []
    for _ in range(6):
        crowd = [connect(server) for _ in range(60)]
        for number, connection in enumerate(crowd):
            connection.sendall(body)
            if number % 3 == 0:  # some leave before they are heard, some by a reset
                connection.close()
            elif number % 3 == 1:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        assert crowd[1].recv(10)
        for connection in crowd:
            connection.close()
        eventually(server.idle, 60)
        eventually(lambda: not server.uvicorn.server_state.tasks, 60)
        eventually(lambda: len(server.uvicorn.server_state.connections) <= 1, 60)
        assert server.post("/v1/completions", ASK).json()["choices"] == expected
        levels.append((resident(), descriptors()))
    finished = server.service.stats.finished
    assert finished["abort"] + finished["length"] + finished["stop"] > 300
    assert finished["abort"] > 100
    first, last = levels[1], levels[-1]
    assert last[0] - first[0] < 8 << 20, levels
    assert last[1] <= first[1] + 2, levels


def test_one_byte_at_a_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and bodies that trickle are ended at their deadline, however steady they are; others are served."""
    monkeypatch.setattr(run.Protocol, "header_seconds", 1.0)
    with serve(llm, limits=HttpLimits(body_seconds=1.5)) as server:
        expected = server.post("/v1/completions", ASK).json()["choices"]
        whole = request("/v1/completions", json.dumps({**ASK, "user": "u" * 4000}).encode())
        head = whole.index(b"\r\n\r\n") + 4

        def trickle(start: int) -> tuple[bytes, float]:
            """What comes back, and how many seconds after the first byte."""
            with closing(connect(server)) as connection:
                began = time.monotonic()
                connection.sendall(whole[:start])
                for at in range(start, len(whole)):
                    connection.settimeout(0.02)
                    try:
                        found = connection.recv(65536)
                    except TimeoutError:
                        with suppress(OSError):
                            connection.sendall(whole[at : at + 1])
                        continue
                    except OSError:
                        found = b""
                    return found, time.monotonic() - began
            raise AssertionError("it was never ended")

        with ThreadPoolExecutor(24) as pool:
            slow = [pool.submit(trickle, start) for start in (1, head) for _ in range(12)]
            answered = 0
            while not all(s.done() for s in slow):
                assert server.post("/v1/completions", ASK).json()["choices"] == expected
                answered += 1
            assert answered > 3
            for number, (found, seconds) in enumerate(s.result() for s in slow):
                assert found == b"" if number < 12 else b" 408 " in found.split(b"\r\n")[0]
                assert seconds > 0.9
        eventually(lambda: len(server.uvicorn.server_state.connections) <= 1)
        eventually(server.idle)


@LINUX
def test_a_thousand_connections(llm: LLM) -> None:
    """Idle ones, half a head, a head without its body, and streams that nobody reads: one more client is served."""
    needed, (soft, hard) = 2 * 1000 + 300, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this process may open {hard} files, not {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    kinds = [
        b"",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half",
        request("/v1/completions", b"{", length=500),
        request("/v1/completions", json.dumps({**LONG, "max_tokens": 20, "stream": True}).encode()),
    ]
    try:
        with serve(llm) as server:
            expected = server.post("/v1/completions", ASK).json()["choices"]
            before, threads = descriptors(), threading.active_count()
            with ExitStack() as crowd:
                for number in range(1000):
                    kind = kinds[3 if number % 20 == 3 else number % 3]
                    crowd.enter_context(closing(connect(server))).sendall(kind)
                eventually(lambda: len(server.uvicorn.server_state.connections) > 1000, 60)
                assert descriptors() >= before + 1900  # some of those that read nothing have ended already
                assert threading.active_count() < threads + 40  # connections have no threads of their own
                for _ in range(3):
                    assert server.post("/v1/completions", ASK).json()["choices"] == expected
                    assert server.get("/health").status_code == 200
            eventually(lambda: len(server.uvicorn.server_state.connections) <= 1, 60)
            eventually(lambda: not server.uvicorn.server_state.tasks, 60)
            eventually(server.idle, 60)
            eventually(lambda: descriptors() <= before + 2, 60)
            assert server.post("/v1/completions", ASK).json()["choices"] == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
