"""A batch: every line of a file answered by the server's own routes, in this process and without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fastapi import FastAPI

from hasten.engine.engine import Engine
from hasten.errors import BackendError
from hasten.server import local
from hasten.server.app import create_app
from hasten.server.batch_input import Line, Requests
from hasten.server.batch_output import FAULT, Results, Summary
from hasten.server.config import Config, HttpLimits, Served
from hasten.server.errors import RequestError
from hasten.server.service import SWITCH_SECONDS, Service, ServiceLimits

UNDER_WAY = 2
"""Requests under way for each that the engine computes at once: the next are ready when one ends."""
FAULTS = 4
"""So many times the requests under way may fail by the engine's fault, none succeeding between."""
TELL_SECONDS = 0.5
GONE = 503


class Report(Protocol):
    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None: ...


def answer(
    make_engine: Callable[[], Engine], served: Served, requests: Requests, results: Results, report: Report
) -> Summary:
    """Answer every request that has none yet, and finish `results`.

    A request that fails by the engine's fault is tried once more, alone, after all others; if it fails again, that is
    its answer. Raises OutputError where an answer cannot be written, InputError where the file changes meanwhile,
    BackendError where the engine fails at everything. What was answered until then is kept.
    """
    started, before, tokens = time.monotonic(), results.count, results.completion_tokens
    service = Service(make_engine, ServiceLimits(queue=sys.maxsize, restarts=sys.maxsize))  # it refuses nothing itself
    at_once = UNDER_WAY * service.engine.program.limits.max_sequences
    limits = HttpLimits(requests=at_once + 1, grammars=at_once)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        run = _Run(create_app(service, Config(served, limits=limits)), service, requests, results, at_once, report)
        asyncio.run(run.all())
    finally:
        sys.setswitchinterval(switch)
        service.stop()
    results.finish()
    return results.summary(before, tokens, time.monotonic() - started)


class _Run:
    def __init__(
        self, app: FastAPI, service: Service, requests: Requests, results: Results, at_once: int, report: Report
    ) -> None:
        self._app, self._service, self._report = app, service, report
        self._requests, self._results, self._at_once = requests, results, at_once
        self._failed: list[Line] = []
        self._failures = 0  # since the last success

    async def all(self) -> None:
        telling = asyncio.create_task(self._tell())
        try:
            await self._together(self._requests.read(self._results.done))
            await self._alone()
        finally:
            telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await telling

    async def _together(self, lines: Iterator[Line]) -> None:
        async def worker() -> None:
            for line in lines:
                status, body = await self._ask(line)
                if status < FAULT:
                    self._failures = 0
                    self._keep(line, status, body)
                else:
                    self._failed.append(Line(line.index, line.number, line.offset, line.custom_id, line.url, {}))
                    self._check_faults(status, body)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._at_once):
                    group.create_task(worker())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _alone(self) -> None:
        """Those that failed, each without company: what fails then did so by itself. They stand last in the file."""
        failed = []
        for line in self._failed:
            status, body = await self._ask(self._requests.again(line))
            if status == GONE:
                raise self._broken(body)
            if status < FAULT:
                self._keep(line, status, body)
            else:
                failed.append((line, status, body))
        for line, status, body in failed:
            self._keep(line, status, body)

    async def _ask(self, line: Line) -> tuple[int, Any]:
        if line.body.get("stream") is True:
            refusal = RequestError("stream is refused in a batch, where an answer is one line", "stream")
            return refusal.status, refusal.document
        try:
            body = encoded_strictly(line.body)
            status, raw = await local.post(self._app, line.url, body)
            return status, json.loads(raw)
        except RecursionError:
            refusal = RequestError("the body is nested too deeply")
            return refusal.status, refusal.document

    def _keep(self, line: Line, status: int, body: Any) -> None:
        self._results.add(line.index, line.custom_id, status, f"req_{secrets.token_hex(12)}", body)

    def _check_faults(self, status: int, body: Any) -> None:
        self._failures += 1
        if status == GONE or self._failures >= FAULTS * self._at_once:
            raise self._broken(body)

    def _broken(self, body: Any) -> BackendError:
        cause = self._service.cause or body["error"]["message"]
        kept = f"{self._results.count} of {len(self._requests)} answers are kept; the same command tries the rest again"
        return BackendError(f"the engine fails at every request: {cause}", kept)

    async def _tell(self) -> None:
        """Progress, also while long answers end none."""
        started, stats = time.monotonic(), self._service.stats
        while True:
            rate = stats.generated_tokens / max(time.monotonic() - started, 1e-9)
            self._report("answering", self._results.count, len(self._requests), f"{rate:.0f} tokens/s")
            await asyncio.sleep(TELL_SECONDS)


def encoded_strictly(body: dict[str, Any]) -> bytes:
    """As the file has it: half of a surrogate pair stays one, for the route to refuse."""
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(body).encode()
