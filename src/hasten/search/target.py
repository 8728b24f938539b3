"""The least loss that reaches a speed: allocated under a time, measured whole, the time moved by what was measured."""

from __future__ import annotations

from dataclasses import replace

from hasten.bench.latency import Run
from hasten.errors import BudgetError
from hasten.search import predict, prove, speed
from hasten.search.job import Job
from hasten.search.prove import Proof
from hasten.search.refine import Choices, Refiner

ROUNDS = 6
AMPLE = 1.06
"""A candidate this much beyond the target could lose less at its speed."""
MARGIN = 1.015
"""Aimed at beyond the target: times vary."""


def original(job: Job) -> Run:
    """The original's run. Raises BudgetError where it is fast enough already."""
    target = job.objective.target
    assert target
    with job.stage("timing"):
        run, _ = prove.timed(job, [], prove.ROUNDS)
    own = speed.rate(run, job.objective)
    if own >= target.rate and job.original_allowed:
        raise BudgetError(
            f"the original reaches the target {target} already: it makes {own:,.1f} tokens a second",
            "state a higher target, or a budget without one",
        )
    return run


def reach(job: Job, refiner: Refiner, proof: Proof, run: Run) -> None:
    """Candidates around the target, measured and timed: in `refiner.tried` and `proof.speeds`.

    `run`: the original's. Where nothing reaches the target, the fastest there is will have been timed.
    """
    target, space = job.objective.target, refiner.space
    assert target
    whole, cost = predict.seconds(run, job.objective), space.original_cost
    aim = predict.seconds_at(target.rate * MARGIN, job.objective)
    scale = 1.0  # seconds of a whole step for one of its matrices timed alone: as the last candidate showed
    seen: list[Choices] = []
    for number in range(1, ROUNDS + 1):
        if number > 2 and not refiner.enough_time():
            break
        choices = _choices(refiner, cost - (whole - aim) / scale)
        if choices in seen or all(c.is_original for c in choices.values()):
            break
        seen.append(choices)
        one = refiner.measure(f"candidate {number}", choices, None)
        prove.time(job, refiner, proof, [one])
        rate = speed.rate(proof.speeds[one.name].run, job.objective)
        if target.rate <= rate <= AMPLE * target.rate:
            break
        # As if it had been timed with the first run: the machine's speed wanders, ratios do not.
        took = whole / proof.speeds[one.name].gain(job.objective.name).estimate
        if one.cost != cost:
            scale = min(max((whole - took) / (cost - one.cost), 0.05), 20.0)
    if not any(speed.rate(s.run, job.objective) >= target.rate for s in proof.speeds.values()):
        fastest = refiner.measure("fastest", _choices(refiner, 0.0), None)
        prove.time(job, refiner, proof, [t for t in [fastest] if t.name not in proof.speeds])


def _choices(refiner: Refiner, cost: float) -> Choices:
    """Of least loss within a cost, or else those of least cost, whatever they lose."""
    try:
        return refiner.space.most_faithful(cost, refiner.most_bytes)
    except BudgetError:
        space = replace(refiner.space, losses=[[min(v, 1e3) for v in row] for row in refiner.space.losses])
        return space.allocate(1e9, refiner.most_bytes)
