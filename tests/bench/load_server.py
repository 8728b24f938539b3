"""A server for the tests of `hasten.bench.load`: its answers are the test's, and it notes what it saw and when."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Seen:
    """A request as it came, and the times at which the server sent its events."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    sent: list[float] = field(default_factory=list)


@dataclass
class Reply:
    """What an answer is written with."""

    seen: Seen
    writer: asyncio.StreamWriter

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.seen.sent.append(time.monotonic())
        await self.chunk(b"data: " + data + b"\n\n")

    async def text(self, text: str = "x", **more: Any) -> None:
        key = {"delta": {"content": text}} if self.chat else {"text": text}
        await self.event({"choices": [{"index": 0, **key, "finish_reason": None}], **more})

    async def usage(self, prompt: int, completion: int, **more: Any) -> None:
        await self.event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}})

    async def done(self) -> None:
        await self.event(b"[DONE]")
        await self.raw(b"0\r\n\r\n")

    async def status(self, status: int, body: bytes = b"", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} So It Is", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode() + body)

    @property
    def chat(self) -> bool:
        return self.seen.path.endswith("/chat/completions")


Answer = Callable[[Reply], Awaitable[None]]


async def well(reply: Reply, first: float = 0.0, gap: float = 0.0) -> None:
    """A proper stream: the first text after `first` seconds, the others `gap` apart, usage, [DONE]."""
    await reply.raw(HEAD)
    await asyncio.sleep(first)
    for number in range(reply.seen.body["max_tokens"]):
        if number:
            await asyncio.sleep(gap)
        await reply.text()
    prompt = reply.seen.body.get("prompt") or reply.seen.body["messages"][0]["content"].split()
    await reply.usage(len(prompt), reply.seen.body["max_tokens"])
    await reply.done()


@dataclass
class Server:
    url: str
    seen: list[Seen] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)


@contextmanager
def serving(answer: Answer = well) -> Iterator[Server]:
    """A server on a thread and port of its own, that lists the model "m" and answers all else with `answer`."""
    loop = asyncio.new_event_loop()
    ready: threading.Event = threading.Event()
    server = Server("")
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split()
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            seen = Seen(method, path, headers, json.loads(body or b"{}"), time.monotonic())
            server.seen.append(seen)
            if path.endswith("/models"):
                await Reply(seen, writer).status(200, b'{"object": "list", "data": [{"id": "m"}]}')
            else:
                await answer(Reply(seen, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        except BaseException as error:
            server.faults.append(error)
        finally:
            tasks.discard(task)
            writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 26)

    async def stop(listening: asyncio.Server) -> None:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)

    def run() -> None:
        asyncio.set_event_loop(loop)
        listening = loop.run_until_complete(start())
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()
        loop.run_forever()
        loop.run_until_complete(stop(listening))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
    assert server.faults == []
