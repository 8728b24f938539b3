"""A recorded prefill and decoding as a Chrome trace: a lane for each thread, for chrome://tracing or Perfetto.

The JSON object form of the Trace Event Format (Duffy and Nelson, "Trace Event Format"): complete events "X" with times
in microseconds, nested by time on a thread, and metadata events "M" that name process and threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from hasten.bench.profile import DRAW, ROPE, Loop, Step
from hasten.bench.regions import Region

Event = dict[str, Any]
PROCESS = 1


def chrome_trace(loops: Sequence[Loop], regions: Sequence[Region], name: str) -> str:
    """The JSON text. `name` is the process's. Time 0 is when the first loop began."""
    origin = loops[0].steps[0].begin
    threads = loops[0].recording.marks.shape[1]
    events = [_metadata("process_name", 0, name=name)]
    for thread in range(threads):
        caller = " (the caller)" if thread == 0 else ""
        events.append(_metadata("thread_name", thread, name=f"thread {thread}{caller}"))
        events.append(_metadata("thread_sort_index", thread, sort_index=thread))
    names = [(ROPE, {}), *((region.label, _facts(region)) for region in regions)]
    for loop in loops:
        for run, step in enumerate(loop.steps):
            events += _step(step, origin)
            for thread in range(threads):
                events += _thread(loop, run, thread, names, origin)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _metadata(kind: str, thread: int, **facts: object) -> Event:
    return {"name": kind, "ph": "M", "ts": 0, "pid": PROCESS, "tid": thread, "args": facts}


def _complete(name: str, category: str, thread: int, begin: int, end: int, facts: dict[str, object]) -> Event:
    times = {"ts": begin / 1000, "dur": (end - begin) / 1000}
    return {"name": name, "cat": category, "ph": "X", **times, "pid": PROCESS, "tid": thread, "args": facts}


def _facts(region: Region) -> dict[str, object]:
    return {"kind": region.kind, "value": region.node.outputs[0]}


def _step(step: Step, origin: int) -> Iterator[Event]:
    span = step.span
    sequences = f"{len(span.positions)} sequence{'s' * (len(span.positions) > 1)}"
    name = f"{span.tokens} token{'s' * (span.tokens > 1)} of {sequences}"
    facts: dict[str, object] = {"positions": [list(ends) for ends in span.positions], "rows": span.rows}
    yield _complete(name, "step", 0, step.begin - origin, step.drawn - origin, facts)
    if step.drawn > step.computed:
        yield _complete(DRAW, "draw", 0, step.computed - origin, step.drawn - origin, {})


def _thread(
    loop: Loop, run: int, thread: int, names: Sequence[tuple[str, dict[str, object]]], origin: int
) -> Iterator[Event]:
    """One thread in one step: its regions, and in them its waits."""
    marks = loop.recording.marks[run, thread].tolist()
    if marks[0] == 0:  # it slept through the step
        return
    for (name, facts), (begin, end) in zip(names, pairwise(marks), strict=True):
        yield _complete(name, "region", thread, begin - origin, end - origin, facts)
    for begin, end in loop.recording.waits[run, thread].tolist():
        if begin:
            yield _complete("wait", "wait", thread, begin - origin, end - origin, {})
