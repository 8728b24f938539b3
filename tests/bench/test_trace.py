"""The Chrome trace, read by the rules of the Trace Event Format's document, which know nothing of the writer."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from bench.test_profile import RECORDING, REGIONS, STEPS, loaded

from hasten.bench.profile import Loop, record
from hasten.bench.regions import describe
from hasten.bench.trace import chrome_trace

Event = dict[str, Any]


def read(text: str) -> list[Event]:
    """The events of a trace in JSON object form; fails where one is not what the format says."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    document = json.loads(text, parse_constant=no_constant)
    assert document["displayTimeUnit"] in ("ms", "ns")
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        assert event["ph"] in ("X", "M")
        if event["ph"] == "M":
            key = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}[event["name"]]
            assert isinstance(event["args"][key], int if key == "sort_index" else str)
        else:
            assert isinstance(event["cat"], str)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    return document["traceEvents"]  # type: ignore[no-any-return]


def nested(events: list[Event]) -> dict[int, list[tuple[int, Event]]]:
    """(depth, complete event) of each thread in order; fails where two overlap and neither holds the other."""
    lanes: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["tid"]].append(event)
    found = {}
    for thread, lane in lanes.items():
        open_until: list[int] = []
        found[thread] = []
        for event in sorted(lane, key=lambda e: (nano(e["ts"]), -nano(e["dur"]))):
            begin, end = nano(event["ts"]), nano(event["ts"]) + nano(event["dur"])
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], f"{event} overlaps what is open until {open_until[-1]}"
            found[thread].append((len(open_until), event))
            open_until.append(end)
    return found


def nano(microseconds: float) -> int:
    value = round(microseconds * 1000)
    assert value == pytest.approx(microseconds * 1000)
    return value


def test_events_by_hand() -> None:
    events = read(chrome_trace([Loop(STEPS, RECORDING)], REGIONS, "by hand"))
    lanes = nested(events)
    shown = [(depth, e["name"], nano(e["ts"]), nano(e["dur"])) for depth, e in lanes[1]]
    assert shown == [
        (0, "rope tables", 12, 1),
        (0, "block 0: a [1 -> 2] f32", 13, 8),
        (0, "block 0: b", 21, 28),
        (1, "wait", 40, 9),
        (0, "block 1: a [1 -> 3] f32", 49, 43),
    ]
    outer = [(e["name"], nano(e["ts"]), nano(e["dur"])) for depth, e in lanes[0] if depth == 0]
    assert outer == [("1 token of 1 sequence", 0, 130), ("1 token of 1 sequence", 130, 210)]
    assert [e["name"] for depth, e in lanes[0] if depth == 2 and e["dur"]] == ["wait", "wait"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(names) == {0, 1}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["by hand"]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_that_runs(threads: int) -> None:
    subject, weights = loaded(threads=threads)
    loops = (record(subject, 1, lambda: subject.prefill(2)), record(subject, 6, lambda: subject.decode(2)))
    program = subject.program
    regions = describe(program.graph, program.plan, weights)
    events = read(chrome_trace(loops, regions, "a model"))
    lanes = nested(events)
    assert set(lanes) <= set(range(threads))
    labels = [region.label for region in regions]
    for thread, lane in lanes.items():
        named = [e["name"] for _, e in lane if e["cat"] == "region" and e["name"] != "rope tables"]
        came = len(named) // len(labels)
        assert came <= 7
        assert thread > 0 or came == 7
        assert named == labels * came  # in the order of the plan, each time
        steps = [depth for depth, e in lane if e["cat"] == "step"]
        assert steps == [0] * (7 if thread == 0 else 0)
    assert sum(e["name"] == "draw tokens" for _, e in lanes[0]) == 7


def test_overlaps_would_be_seen() -> None:
    event = {"ph": "X", "tid": 0, "dur": 2.0}
    with pytest.raises(AssertionError, match="overlaps"):
        nested([{**event, "ts": 0.0}, {**event, "ts": 1.0}])
