"""What a whole candidate's step should take, beside what it took.

A step is the sum of its matrices, each timed alone, and a rest: attention, norms, and what lies between kernels. The
rest is the original's step less its matrices. Formats that quantise their inputs add to it, so what was measured of
candidates corrects it by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from hasten.bench.latency import Run
from hasten.engine.llm import STEP_TOKENS
from hasten.search.objective import Objective
from hasten.search.refine import Refiner, Tried
from hasten.search.speed import Speed

CLOSE = 0.05
"""A prediction this near to what was measured, relative to it, is near."""


@dataclass(frozen=True)
class Prediction:
    """A candidate's time as a share of the original's in the same rounds.

    `composed`: as the matrices' times say; `corrected`: moved by the constant that the other candidates' times suggest;
    `measured` lies between `low` and `high`, 95% of the time.
    """

    name: str
    composed: float
    corrected: float
    measured: float
    low: float
    high: float

    @property
    def error(self) -> float:
        return self.corrected / self.measured - 1


def seconds(run: Run, objective: Objective) -> float:
    """What the objective's phases took together, in a run."""
    if objective.name == "prefill":
        return min(STEP_TOKENS, objective.prompt) / run.prefill_tokens_per_second
    step = objective.batch / run.decode_tokens_per_second
    if objective.name != "throughput":
        return step
    return objective.batch * objective.prompt / run.prefill_tokens_per_second + objective.new * step


def seconds_at(rate: float, objective: Objective) -> float:
    """What the phases take together at so many tokens a second (`speed.rate`)."""
    if objective.name == "prefill":
        return min(STEP_TOKENS, objective.prompt) / rate
    return objective.batch * (objective.new if objective.name == "throughput" else 1) / rate


def predictions(
    refiner: Refiner, objective: Objective, runs: Mapping[str, Run], speeds: Mapping[str, Speed]
) -> list[Prediction]:
    """Of every candidate that was timed; each is corrected by the others only."""
    if objective.name == "memory":
        return []
    whole = refiner.space.whole
    composed = {
        t.name: compose(refiner, t, whole or seconds(runs[t.name], objective)) for t in refiner.tried if t.name in runs
    }
    gains = {name: speeds[name].gain(objective.name) for name in composed}
    off = {name: 1 / gains[name].estimate - share for name, share in composed.items()}
    found = []
    for name, share in composed.items():
        others = [v for other, v in off.items() if other != name]
        gain = gains[name]
        corrected = share + (median(others) if others else 0.0)
        found.append(Prediction(name, share, corrected, 1 / gain.estimate, 1 / gain.high, 1 / gain.low))
    return found


def compose(refiner: Refiner, candidate: Tried, original: float) -> float:
    """The candidate's time as a share of the original's, which took `original` seconds."""
    return 1 - (refiner.space.original_cost - candidate.cost) / original


def near(found: list[Prediction]) -> float | None:
    """The share of predictions that are near what was measured."""
    return sum(abs(p.error) <= CLOSE for p in found) / len(found) if found else None
