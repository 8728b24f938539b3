"""What a whole candidate's step should take, beside what it took.

A step is the sum of its matrices and a rest: attention, norms, and what lies between kernels. The rest is the
original's step less its matrices. What these take alone is corrected by whole models in one format each (`whole.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from hasten.bench.latency import Run
from hasten.engine.llm import STEP_TOKENS
from hasten.search.objective import Objective
from hasten.search.refine import Refiner
from hasten.search.speed import Speed

LEAST = 0.01
"""Of the original's time that a prediction says at least."""
CLOSE = 0.05
"""A prediction this near to what was measured, relative to it, is near."""


@dataclass(frozen=True)
class Prediction:
    """A candidate's time as a share of the original's in the same rounds.

    `composed`: as the matrices' times alone say; `expected`: as whole models in each format, timed before, have
    corrected these; `corrected`: moved as far as the other candidates of the same rounds have moved, for a machine's
    state changes how much faster anything is. `measured` lies between `low` and `high`, 95% of the time.
    """

    name: str
    composed: float
    expected: float
    corrected: float
    measured: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Of what the search expected, before the candidate was timed."""
        return self.expected / self.measured - 1


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
    """Of every candidate that was timed."""
    if objective.name == "memory":
        return []
    space = refiner.space
    tried = [t for t in refiner.tried if t.name in runs]
    measured = {t.name: 1 / speeds[t.name].gain(objective.name).estimate for t in tried}
    took = {t.name: space.whole.seconds if space.whole else seconds(runs[t.name], objective) for t in tried}
    # Kernels alone may sum up to more than the whole.
    expected = {t.name: max(1 - (space.original_cost - t.cost) / took[t.name], LEAST) for t in tried}
    found = []
    for one in tried:
        # What was timed in the same rounds has the original's run in common.
        others = [t.name for t in tried if t is not one and runs[t.name] is runs[one.name]]
        state = median(measured[name] / expected[name] for name in others) if others else 1.0
        composed = 1 - (space.original_alone - space.alone(one.choices)) / took[one.name]
        known, gain = expected[one.name], speeds[one.name].gain(objective.name)
        found.append(
            Prediction(one.name, composed, known, known * state, measured[one.name], 1 / gain.high, 1 / gain.low)
        )
    return found
