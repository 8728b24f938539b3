"""What a whole candidate's step should take, beside what it took.

A step is the sum of its matrices and a rest: attention, norms, and what lies between kernels. The rest is the
original's step less its matrices. What these take alone is corrected by whole models in one format each (`whole.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.bench.latency import Run
from hasten.engine.llm import STEP_TOKENS
from hasten.search.objective import Objective
from hasten.search.refine import Refiner
from hasten.search.speed import Speed

CLOSE = 0.05
"""A prediction this near to what was measured, relative to it, is near."""


@dataclass(frozen=True)
class Prediction:
    """A candidate's time as a share of the original's in the same rounds.

    `composed`: as the matrices' times alone say; `corrected`: as whole models in each format have corrected these;
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
    """Of every candidate that was timed, by what was known before."""
    if objective.name == "memory":
        return []
    space, found = refiner.space, []
    for one in refiner.tried:
        if one.name not in runs:
            continue
        took = space.whole.seconds if space.whole else seconds(runs[one.name], objective)
        gain = speeds[one.name].gain(objective.name)
        corrected = 1 - (space.original_cost - one.cost) / took
        composed = 1 - (space.original_alone - space.alone(one.choices)) / took
        found.append(Prediction(one.name, composed, corrected, 1 / gain.estimate, 1 / gain.high, 1 / gain.low))
    return found


def near(found: list[Prediction]) -> float | None:
    """The share of predictions that are near what was measured."""
    return sum(abs(p.error) <= CLOSE for p in found) / len(found) if found else None
