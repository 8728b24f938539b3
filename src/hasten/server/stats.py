"""What a running service counts. Written by one thread, read by any: every field is a number or only grows."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)


class Histogram:
    """Counts of values by upper bound, and their sum: what Prometheus calls a histogram."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Stats:
    """Since the service began; an engine that was started anew does not reset them."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Choices by why they ended: stop, length, abort, error."""
    refused: int = 0
    """Requests that met a full queue."""
    faults: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache; `looked_up` is how many were looked for."""
    looked_up: int = 0
    preemptions: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    request: Histogram = field(default_factory=Histogram)
