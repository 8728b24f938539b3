"""A real server on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from hasten import LLM
from hasten.backends.batch import Batch, Outputs
from hasten.engine.engine import Engine
from hasten.server.app import create_app
from hasten.server.config import Config, HttpLimits, Served
from hasten.server.run import bind, make_server
from hasten.server.service import Service, ServiceLimits


class Program:
    """A program that can be made to fail, or to wait, at its next step."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.limits = program.limits
        self.faults: list[BaseException] = []
        self.open = threading.Event()
        self.open.set()
        self.steps = 0

    def step(self, batch: Batch) -> Outputs:
        self.open.wait()
        self.steps += 1
        if self.faults:
            raise self.faults.pop(0)
        made: Outputs = self._program.step(batch)
        return made


@dataclass
class Server:
    url: str
    service: Service
    app: Any
    program: Program
    uvicorn: Any
    thread: threading.Thread
    client: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def post(self, path: str, document: Any, **headers: str) -> httpx.Response:
        return self.send(path, json.dumps(document).encode(), **headers)

    def send(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        return self.client.post(path, content=body, headers={"content-type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers=headers)

    def idle(self) -> bool:
        """Nothing runs, and every block of the cache is free."""
        blocks = self.service.engine.blocks
        return self.service.active == 0 and blocks.free == blocks.count


MESSAGES = [{"role": "user", "content": "hello"}]


def completion(server: Server, **fields: Any) -> httpx.Response:
    return server.post("/v1/completions", {"prompt": "x", "max_tokens": 2, **fields})


def conversation(server: Server, **fields: Any) -> httpx.Response:
    return server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, **fields})


def eventually(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@contextmanager
def serve(
    llm: LLM,
    *,
    keys: tuple[str, ...] = (),
    limits: HttpLimits | None = None,
    service_limits: ServiceLimits | None = None,
    template: str | None = None,
    drain_seconds: float = 5,
) -> Iterator[Server]:
    program = Program(llm.program)

    def make_engine() -> Engine:
        return Engine(program, llm.model.graph.vocabulary, llm.tokenizer, llm.model.eos_token_ids)

    service = Service(make_engine, service_limits)
    source = llm.tokenizer.chat_template if template is None else template
    served = Served(("demo",), llm.tokenizer, llm.program.limits.context, llm.model.graph.vocabulary, {}, source)
    app = create_app(service, Config(served, keys, limits=limits or HttpLimits()))
    bound: socket.socket = bind("127.0.0.1", 0)
    host, port = bound.getsockname()
    uvicorn = make_server(app, drain_seconds)
    thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [bound]})
    thread.start()
    client = httpx.Client(base_url=f"http://{host}:{port}", timeout=180)
    server = Server(f"http://{host}:{port}", service, app, program, uvicorn, thread, client)
    try:
        eventually(lambda: uvicorn.started)
        yield server
    finally:
        program.open.set()
        client.close()
        uvicorn.should_exit = True
        thread.join(20)
        service.stop()
        bound.close()
        assert not thread.is_alive()
