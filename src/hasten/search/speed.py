"""Whole candidates and the original timed in turn, A B C A B C, as serving runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hasten.bench import latency
from hasten.bench.latency import Run, Times
from hasten.compress.calibrate import Weights
from hasten.graph.graph import Graph

Report = Callable[[str, int, int], None]
RESAMPLES = 2000


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the original: the median over rounds, and its 95% interval."""

    estimate: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.low > 1.0


@dataclass(frozen=True)
class Speed:
    """One candidate's run, and its gains over the original timed in the same rounds."""

    run: Run
    decode: Gain
    prefill: Gain

    def gain(self, objective: str) -> Gain:
        return self.prefill if objective == "prefill" else self.decode


def lengths(graph: Graph) -> tuple[int, int]:
    """(prompt, new): 512 and 64 tokens, or what the model's context holds."""
    prompt = min(512, graph.context // 2)
    return prompt, min(64, graph.context - prompt)


def compare(
    graph: Graph,
    original: Weights,
    candidates: Sequence[Weights],
    *,
    threads: int,
    rounds: int,
    report: Report,
) -> tuple[Run, list[Speed]]:
    """The original's run, and each candidate's speed."""
    prompt, new = lengths(graph)
    subjects = [
        latency.Loaded(graph, weights, prompt=prompt, new=new, batch=1, threads=threads)
        for weights in (original, *candidates)
    ]
    ((runs, times),) = latency.time_in_turn(subjects, [1], threads=threads, rounds=rounds, progress=report)
    first = times[0]
    return runs[0], [
        Speed(run, gain(first, own, "decode"), gain(first, own, "prefill"))
        for run, own in zip(runs[1:], times[1:], strict=True)
    ]


def gain(first: Sequence[Times], second: Sequence[Times], part: str) -> Gain:
    """first / second round by round: median, and the interval of medians of resampled rounds."""
    ratios = np.array([getattr(a, part) / getattr(b, part) for a, b in zip(first, second, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Gain(float(np.median(ratios)), float(low), float(high))
