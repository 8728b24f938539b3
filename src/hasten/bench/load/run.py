"""A load on a server from its first request to its last answer.

Open loop: every request is sent when its time comes, however many are still unanswered, for users do not wait for each
other. Closed loop: so many clients, each with one request at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from hasten.bench.load.arrivals import Load
from hasten.bench.load.client import Record, Target, now, send
from hasten.bench.load.prompts import Bodies
from hasten.bench.load.traces import Arrival
from hasten.errors import InputError

Progress = Callable[[str, int, int], None]
AHEAD_BYTES = 256 << 20  # of bodies made before the load begins, so that making them disturbs no measurement
AHEAD_REQUESTS = 2000
STRANGERS = 1 << 40  # the number of the first request of a warm-up
BEAT_SECONDS = 0.02
REPORT_SECONDS = 0.25
FAILURE_PAUSE = 0.5  # of a closed loop's client after a failure: a dead server is not asked a thousand times a second
REFUSAL_PAUSE = 1.0  # after a refusal that does not say how long to wait
MOST_PAUSE = 60.0


@dataclass
class Result:
    """What a load found. Times are seconds of the monotonic clock."""

    start: float = field(default_factory=now)
    end: float = 0.0
    records: list[Record] = field(default_factory=list)
    planned: int | None = None
    """Requests that the load has in all; None where clients go on until time is up."""
    beats: array[float] = field(default_factory=lambda: array("d"))
    """How late the client's own timer came, seconds, some fifty times a second."""
    cpu_seconds: float = 0.0
    interrupted: bool = False


async def drive(
    target: Target,
    load: Load,
    arrivals: Iterable[Arrival],
    bodies: Bodies,
    *,
    endpoint: str,
    timeout: float,
    warmup: int,
    report: Progress,
) -> Result:
    """Send the requests of a load, of which there is at least one. Cancelled (Ctrl-C), it returns what there is so far.

    Raises InputError where the warm-up fails.
    """
    run = _Run(target, load, endpoint, timeout, report)
    run.result.planned = len(arrivals) if isinstance(arrivals, Sequence) else None
    first, arrivals = _first(arrivals)
    strangers = [replace(first, blocks=())] * warmup  # prompts of their own: the load must find none of its own cached
    requests = _prepared(_requests(target, endpoint, bodies, arrivals), run.result.planned or AHEAD_REQUESTS, report)
    try:
        await run.warm_up(list(_requests(target, endpoint, bodies, strangers, STRANGERS)))
        await run.whole(requests)
    except asyncio.CancelledError:
        run.result.interrupted = True
        run.result.end = run.result.end or now()
    return run.result


@dataclass(frozen=True, slots=True)
class _Request:
    arrival: Arrival
    number: int
    data: bytes


def _first(arrivals: Iterable[Arrival]) -> tuple[Arrival, Iterator[Arrival]]:
    """The first of them, and all of them."""
    rest = iter(arrivals)
    first = next(rest)
    return first, chain([first], rest)


def _requests(
    target: Target, endpoint: str, bodies: Bodies, arrivals: Iterable[Arrival], start: int = 0
) -> Iterator[_Request]:
    for number, arrival in enumerate(arrivals, start):
        yield _Request(arrival, number, target.request("POST", endpoint, bodies.body(arrival, number)))


def _prepared(requests: Iterator[_Request], count: int, report: Progress) -> Iterator[_Request]:
    """The same requests, of `count` as many made now as memory should hold."""
    ready: deque[_Request] = deque()
    size = 0
    for request in requests:
        ready.append(request)
        size += len(request.data)
        report("making prompts", len(ready), count)
        if size > AHEAD_BYTES or len(ready) >= AHEAD_REQUESTS:
            break

    def give() -> Iterator[_Request]:
        while ready:
            yield ready.popleft()
        yield from requests

    return give()


class _Run:
    def __init__(self, target: Target, load: Load, endpoint: str, timeout: float, report: Progress) -> None:
        self.result = Result()
        self._target, self._load, self._endpoint = target, load, endpoint
        self._timeout, self._report = timeout, report
        self._finished = 0

    async def warm_up(self, requests: Sequence[_Request]) -> None:
        """One after the other, unmeasured."""
        for done, request in enumerate(requests):
            self._report("warming up", done, len(requests))
            record = Record(request.number, request.arrival.prompt, request.arrival.new)
            await send(self._target, request.data, record, self._timeout)
            if record.outcome != "completed":
                raise InputError(f"the warm-up failed: {record.error}: {record.detail}")

    async def whole(self, requests: Iterator[_Request]) -> None:
        """The load, with the client's own pulse beside it."""
        cpu = time.process_time()
        self.result.start = now()
        pulse = asyncio.create_task(self._pulse())
        tasks: set[asyncio.Task[Any]] = set()
        try:
            if self._load.clients is None:
                await self._open(requests, tasks)
            else:
                tasks.update(asyncio.create_task(self._client(requests)) for _ in range(self._load.clients))
            await asyncio.gather(*tasks)
        finally:
            self.result.end = now()
            self.result.cpu_seconds = time.process_time() - cpu
            for task in (pulse, *tasks):
                task.cancel()
            await asyncio.gather(pulse, *tasks, return_exceptions=True)

    async def _open(self, requests: Iterator[_Request], tasks: set[asyncio.Task[Any]]) -> None:
        for request in requests:
            due = self.result.start + request.arrival.at
            await asyncio.sleep(max(0.0, due - now()))
            task = asyncio.create_task(self._one(request, due))
            tasks.add(task)
            task.add_done_callback(lambda over: None if over.cancelled() or over.exception() else tasks.discard(over))

    async def _client(self, requests: Iterator[_Request]) -> None:
        """One user of a closed loop: the next request when the one before is over."""
        until = self.result.start + self._load.duration if self._load.duration is not None else None
        pause = 0.0
        while (request := next(requests, None)) is not None:
            await asyncio.sleep(pause)
            if until is not None and now() >= until:
                return
            pause = _pause(await self._one(request, None))

    async def _one(self, request: _Request, due: float | None) -> Record:
        record = Record(request.number, request.arrival.prompt, request.arrival.new, due)
        self.result.records.append(record)
        await send(self._target, request.data, record, self._timeout)
        self._finished += 1
        return record

    async def _pulse(self) -> None:
        """Notes how late this loop comes to its timers, and shows how far the load is."""
        shown = 0.0
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                before = now()
                await asyncio.sleep(BEAT_SECONDS)
                self.result.beats.append(max(0.0, now() - before - BEAT_SECONDS))
                if now() - shown > REPORT_SECONDS:
                    shown = now()
                    self._report(*self._progress())

    def _progress(self) -> tuple[str, int, int]:
        if self.result.planned is not None:
            return "requests", self._finished, self.result.planned
        duration = self._load.duration or 0.0
        return "seconds", int(min(now() - self.result.start, duration)), int(duration)


def _pause(record: Record) -> float:
    if record.outcome == "refused":
        return min(REFUSAL_PAUSE if record.retry_after is None else record.retry_after, MOST_PAUSE)
    return FAILURE_PAUSE if record.outcome == "failed" else 0.0
