"""What else is measured of a candidate once it is chosen, and told beside it: none of it decides anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hasten.search import batches, contribution, domains, predict, prove
from hasten.search.job import CONTENDERS, Job
from hasten.search.prove import Proof
from hasten.search.refine import Refiner, Tried
from hasten.search.schedule import TIMING_SECONDS
from hasten.search.trials import Trials

Json = dict[str, Any]
MOST_TIMED = 2 * CONTENDERS
"""Candidates timed only to see how well their times were predicted."""


@dataclass
class Evidence:
    contributions: list[Json] = field(default_factory=list)
    other: list[Json] = field(default_factory=list)
    batches: list[Json] = field(default_factory=list)
    predictions: list[Json] = field(default_factory=list)


def gather(job: Job, refiner: Refiner, proof: Proof, chosen: Tried, each: float, trials: Trials) -> Evidence:
    """As much as there is time for. `each`: seconds that the original takes for a token."""
    found, weights = Evidence(), refiner.model(chosen.choices)
    refiner.enough_time = lambda: job.clock.left() > refiner.slowest + TIMING_SECONDS
    with job.stage("what bought what"):
        found.contributions = [c.json() for c in contribution.contributions(refiner, chosen)]
    with job.stage("another domain"):
        found.other = domains.measure(job, chosen.choices, weights, each, trials)
    with job.stage("batch sizes"):
        found.batches = batches.measure(job, weights, each)
    if job.objective.name != "memory":
        with job.stage("predictions"):
            rest = [t for t in refiner.tried if t.name not in proof.speeds][:MOST_TIMED]
            for start in range(0, len(rest), CONTENDERS):
                if refiner.enough_time():
                    prove.time(job, refiner, proof, rest[start : start + CONTENDERS])
            predictions = predict.predictions(refiner, job.objective, proof.runs, proof.speeds)
            found.predictions = [{**asdict(p), "error": p.error} for p in predictions]
    return found
