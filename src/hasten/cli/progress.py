"""Progress on stderr: a bar on a terminal, a line now and then elsewhere. Library code sees only a callback."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """What library code calls. A stage is over when done reaches total; `detail` is shown beside the numbers."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None: ...


QUIET_SECONDS = 2.0
LINE_EVERY_SECONDS = 10.0


class Bar(Protocol):
    def advance(self, count: int = 1) -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """A bar of `total` steps for the length of the with-block."""
    with reporter() as report:
        bar = _Counter(report, description, total)
        report(description, 0, total)
        yield bar


@contextmanager
def reporter() -> Iterator[Report]:
    """A callback that shows each stage as it goes. The display is gone when the with-block ends."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))
    beside = TextColumn("{task.fields[detail]}")
    with Progress(*columns, *times, beside, console=Console(stderr=True), transient=True) as display:
        tasks = {}

        def report(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, total=total, detail="")
            display.update(tasks[stage], completed=done, total=total, detail=detail)

        yield report


class _Counter:
    def __init__(self, report: Report, description: str, total: int) -> None:
        self._report, self._description, self._total, self._done = report, description, total, 0

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._report(self._description, self._done, self._total)


class _Lines:
    """Stages that take longer than two seconds, as plain lines."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._next = 0.0

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._next = stage, now + QUIET_SECONDS
        elif now >= self._next:
            self._next = now + LINE_EVERY_SECONDS
            print(f"{stage}: {done}/{total}{', ' if detail else ''}{detail}", file=sys.stderr, flush=True)
