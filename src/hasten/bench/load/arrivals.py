"""When requests come and how long they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from hasten.bench.load import traces
from hasten.bench.load.traces import Arrival
from hasten.errors import InputError

MOST_CLIENTS = 10_000
MOST_REQUESTS = 200_000
MOST_RATE = 1e5
TIMES, LENGTHS = 1, 2  # streams of random numbers under one seed


@dataclass(frozen=True)
class Load:
    """What is sent and when. Times are a trace's, a Poisson process's of `rate` a second, or, with `clients`, those at
    which the answer before is over (closed loop). Lengths are the trace's, else uniform in `prompt`, and `new`.

    Raises InputError where the parts contradict each other or are out of range.
    """

    trace: Path | None = None
    rate: float | None = None
    clients: int | None = None
    prompt: tuple[int, int] = (128, 512)
    new: int = 64
    prefix: int = 0
    """Tokens that all prompts begin with, before their own."""
    limit: int | None = None
    """Requests at most."""
    duration: float | None = None
    """Seconds in which requests are sent; what is under way then is waited for."""
    time_scale: float = 1.0
    length_scale: float = 1.0
    context: int | None = None
    """Requests of a trace with more tokens than this, prompt and answer together, are left out."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.prompt
        if not 1 <= low <= high <= traces.MOST_TOKENS:
            raise InputError(f"a prompt of {low}:{high} tokens: must be MIN:MAX with 1 <= MIN <= MAX")
        _within("--new", self.new, 1, traces.MOST_TOKENS)
        _within("--prefix", self.prefix, 0, traces.MOST_TOKENS)
        _within("--seed", self.seed, 0, 1 << 63)
        _within("--time-scale", self.time_scale, 1e-6, 1e6)
        _within("--length-scale", self.length_scale, 1e-6, 1e3)
        if self.rate is not None:
            _within("--rate", self.rate, 1e-6, MOST_RATE)
        if self.clients is not None:
            _within("--clients", self.clients, 1, MOST_CLIENTS)
        if self.limit is not None:
            _within("--limit-requests", self.limit, 1, MOST_REQUESTS)
        if self.duration is not None:
            _within("--duration", self.duration, 1e-3, 1e7)
        self._agree()

    def _agree(self) -> None:
        if self.rate is not None and self.clients is not None:
            raise InputError("--rate and --clients are two kinds of load", "open loop: --rate; closed loop: --clients")
        if self.trace is None and self.rate is None and self.clients is None:
            raise InputError(
                "nothing says when requests come", "--trace FILE, --rate REQUESTS_A_SECOND or --clients COUNT"
            )
        if self.trace is None and self.limit is None and self.duration is None:
            raise InputError("nothing says when the load is over", "--limit-requests 100 or --duration 60")
        if self.time_scale != 1 and (self.trace is None or self.rate or self.clients):
            raise InputError("--time-scale stretches a trace's own times", "--rate says how many come a second")
        for name, given in (("length-scale", self.length_scale != 1), ("context", self.context is not None)):
            if given and self.trace is None:
                raise InputError(f"--{name} goes with --trace", "--prompt MIN:MAX and --new COUNT set lengths")
        if self.prefix and self.trace is not None:
            raise InputError("--prefix goes without --trace", "Mooncake's traces say themselves what prompts share")

    @property
    def kind(self) -> str:
        if self.clients is not None:
            return f"closed loop of {self.clients} client{'s' * (self.clients > 1)}"
        return f"Poisson arrivals, {self.rate:g} a second" if self.rate else "a trace's arrivals"


class Schedule:
    """The requests of a load, drawn as they are asked for; `left_out` counts those longer than its context."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.left_out = 0

    def __iter__(self) -> Iterator[Arrival]:
        return islice(self._timed(), self.load.limit)

    def _timed(self) -> Iterator[Arrival]:
        load = self.load
        gaps = np.random.default_rng([load.seed, TIMES])
        now = 0.0
        for arrival in self._trace(load.trace) if load.trace else self._drawn():
            if load.clients is not None:
                yield replace(arrival, at=0.0)
                continue
            now = now + gaps.exponential(1 / load.rate) if load.rate else arrival.at * load.time_scale
            if load.duration is not None and now >= load.duration:
                return
            yield replace(arrival, at=now)

    def _trace(self, path: Path) -> Iterator[Arrival]:
        scale, context = self.load.length_scale, self.load.context
        block = scaled(traces.MOONCAKE_BLOCK, scale)
        for arrival in traces.read(path):
            prompt, new = scaled(arrival.prompt, scale), scaled(arrival.new, scale)
            if context is not None and prompt + new > context:
                self.left_out += 1
                continue
            yield Arrival(arrival.at, prompt, new, arrival.blocks, block)

    def _drawn(self) -> Iterator[Arrival]:
        lengths = np.random.default_rng([self.load.seed, LENGTHS])
        low, high = self.load.prompt
        for _ in count():
            yield Arrival(0.0, self.load.prefix + int(lengths.integers(low, high + 1)), self.load.new)


def planned(schedule: Schedule) -> list[Arrival] | Schedule:
    """Every request of a load, read and checked; the schedule itself where clients go on until time is up.

    Raises InputError where there is no request, or too many to keep.
    """
    load = schedule.load
    if load.clients is not None and load.trace is None and load.limit is None:
        return schedule
    found = list(islice(schedule, MOST_REQUESTS + 1))
    if len(found) > MOST_REQUESTS:
        raise InputError(f"more than {MOST_REQUESTS:,} requests", "--limit-requests or --duration sends fewer")
    if not found:
        hint = "a larger --context, or a smaller --length-scale" if schedule.left_out else "a longer --duration"
        raise InputError(f"no request to send; {schedule.left_out} are longer than the context", hint)
    return found


def scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))


def _within(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} is {value}, must be from {low:g} to {high:g}")
