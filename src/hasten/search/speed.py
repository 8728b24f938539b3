"""Whole candidates and the original timed in turn, A B C A B C, as serving runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hasten.bench import latency
from hasten.bench.latency import Run, Times
from hasten.compress.calibrate import Weights
from hasten.graph.graph import Graph
from hasten.search.objective import Objective
from hasten.search.quality import AUTO, KvFormats

Report = Callable[[str, int, int], None]
RESAMPLES = 2000
DECODES = 3
"""In a round: short as they are, one alone says little."""


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
    together: Gain | None = None
    """Of prompts and decoding in one."""

    def gain(self, objective: str) -> Gain:
        if objective == "throughput" and self.together:
            return self.together
        return self.prefill if objective == "prefill" else self.decode


def rate(run: Run, objective: Objective) -> float:
    """Tokens a second of what the objective is about; of throughput the new ones, prompts' time included."""
    if objective.name == "prefill":
        return run.prefill_tokens_per_second
    if objective.name != "throughput":
        return run.decode_tokens_per_second
    new, prompts = objective.batch * objective.new, objective.batch * objective.prompt
    return new / (prompts / run.prefill_tokens_per_second + new / run.decode_tokens_per_second)


def compare(
    original: tuple[Graph, Weights],
    graph: Graph,
    candidates: Sequence[Weights],
    *,
    objective: Objective,
    threads: int,
    rounds: int,
    report: Report,
    kv_formats: KvFormats = AUTO,
) -> tuple[Run, list[Speed]]:
    """The original's run, and the speed of each candidate of `graph`, with the objective's batch and lengths.

    `kv_formats`: of the original's cache and the candidates'.
    """
    prompt, new, batch = objective.prompt, objective.new, objective.batch
    subjects = [
        latency.Loaded(own, weights, prompt=prompt, new=new, batch=batch, threads=threads, kv_format=kv)
        for own, weights, kv in (
            (*original, kv_formats[0]),
            *((graph, weights, kv_formats[1]) for weights in candidates),
        )
    ]
    ((runs, times),) = latency.time_in_turn(
        subjects, [batch], threads=threads, rounds=rounds, progress=report, decodes=DECODES
    )
    first = times[0]
    return runs[0], [
        Speed(run, gain(first, own, "decode"), gain(first, own, "prefill"), gain(first, own, "together"))
        for run, own in zip(runs[1:], times[1:], strict=True)
    ]


def gain(first: Sequence[Times], second: Sequence[Times], part: str) -> Gain:
    """first / second round by round: median, and the interval of medians of resampled rounds."""
    ratios = np.array([_seconds(a, part) / _seconds(b, part) for a, b in zip(first, second, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Gain(float(np.median(ratios)), float(low), float(high))


def _seconds(times: Times, part: str) -> float:
    return times.prefill + times.decode if part == "together" else float(getattr(times, part))
