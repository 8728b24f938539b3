"""A search with a limit: it ends in time, with the best that it knows, and a run continued decides as it did before."""

from __future__ import annotations

import json

import pytest
from search.test_accelerate import as_fast, files, quick, run, settings  # noqa: F401

from hasten.search import clock, schedule
from hasten.search.trials import Trials


class Time:
    """A clock that every look at moves on by `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def limited(monkeypatch, step: float) -> Time:
    time = Time(step)
    monkeypatch.setattr(clock, "time", time)
    monkeypatch.setattr(schedule, "TIMING_SECONDS", 1.0)
    return time


def test_the_best_known_is_proven_when_time_is_over(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    measured = {}
    for name, step in (("ample", 0.001), ("short", 2.0), ("none", 1000.0)):
        time = limited(monkeypatch, step)
        outcome, notes = run(settings(files, tmp_path / name, budget="ppl=5%", minutes=1.0))
        assert outcome.output is not None, (name, outcome.reason)
        assert outcome.document["verdict"]["holds"]
        measured[name] = len(outcome.document["candidates"])
        assert any("it cannot do with less here" in note for note in notes) is (name == "none"), time.now
    assert measured["none"] == 1
    assert measured["ample"] > 2


def test_a_real_limit_is_kept(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    """Six seconds, of which the machine may be away for some: stages end, none waits for the limit."""
    as_fast(2.0, monkeypatch)
    outcome, _ = run(settings(files, tmp_path / "fast", budget="ppl=5%", minutes=0.1))
    assert outcome.output is not None, outcome.reason
    total = sum(outcome.document["seconds"].values())
    assert total < 60


def test_what_was_decided_stays_decided(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    limited(monkeypatch, 1.0)
    real, stop_at = Trials.put, [10**9]
    schedules: list[tuple[str, str]] = []

    def put(self, kind, key, value):
        real(self, kind, key, value)
        if kind == "schedule":
            schedules.append((key[0], json.dumps(value)))
        if kind == "quality":
            stop_at[0] -= 1
            if not stop_at[0]:
                raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "put", put)
    given = settings(files, tmp_path / "fast", budget="ppl=5%", minutes=10.0)
    stop_at[0] = 2
    with pytest.raises(KeyboardInterrupt):
        run(given)
    first = list(schedules)
    names = {"calibration", "candidates", "whole", "sensitivity", "caches", "texts", "shapes"}
    assert {name for name, _ in first} == names
    limited(monkeypatch, 40.0)  # far less time than before
    outcome, _ = run(given)
    assert outcome.output is not None
    assert schedules == first


def test_fewer_formats_where_packing_takes_long(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    monkeypatch.setattr(schedule, "FEWEST", ("int8-g64",))
    real = schedule.time

    class Slow:
        def monotonic(self) -> float:
            return 1e6 * real.monotonic()

    monkeypatch.setattr(schedule, "time", Slow())
    outcome, notes = run(settings(files, tmp_path / "fast", budget="ppl=5%", minutes=5.0))
    assert any("only int8-g64 are tried" in note for note in notes)
    tried = {c["format"] for t in outcome.document["tensors"] for c in t["choices"]}
    assert tried == {"f32", "int8-g64"}


def test_one_candidate_is_always_measured(monkeypatch) -> None:
    from search.test_refine import Judge, refiner, space

    one = refiner(space(), Judge(space(), 1.0))
    one.enough_time = lambda: False
    one.uniforms()
    one.search()
    assert len(one.tried) == 1
