"""Chooses the fastest candidate that likely keeps the budget, and proves it on text that nothing has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hasten.backends.batch import Int32
from hasten.bench.latency import Run
from hasten.compress.recipe import Choice
from hasten.evaluate.bootstrap import interval
from hasten.evaluate.perplexity import Evaluation
from hasten.search import quality, speed
from hasten.search.job import CONTENDERS, Job
from hasten.search.quality import Reading, finite
from hasten.search.refine import Refiner, Tried, facts
from hasten.search.speed import Gain, Speed
from hasten.search.texts import digest
from hasten.search.trials import Trials

ROUNDS = 5
FINAL_ROUNDS = 9
LEVELS = (0.95, 0.99)
"""Of the interval whose upper end must keep the budget, on the first and on every later attempt.

With three attempts a candidate beyond the budget is let through in at most 2.5% + 0.5% + 0.5% of searches."""


@dataclass(frozen=True)
class Attempt:
    """One evaluation on a slice of the final text that no earlier one saw."""

    name: str
    reading: Reading
    holds: bool
    figures: dict[str, Any]
    """perplexity and its interval before and after, KL divergence, top-1 agreement."""


@dataclass
class Proof:
    """How the choice went. `chosen` is None where nothing faster was proven within the budget: `reason` says why."""

    chosen: Tried | None = None
    reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    speeds: dict[str, Speed] = field(default_factory=dict)
    final: dict[str, tuple[Run, Speed]] = field(default_factory=dict)
    """By candidate: the original's run and its own, of the times that the report shows."""


def prove(job: Job, refiner: Refiner, slices: Sequence[list[Int32]], trials: Trials) -> Proof:
    """Up to one attempt a slice; after a failure the next candidate is a more careful one.

    What was tried on a slice is on disk with the outcome. A run continued replays it, whatever clocks say by then: no
    slice is looked at twice.
    """
    proof = Proof()
    rejected: list[str] = []
    for number, text in enumerate(slices, 1):
        proof.reason = ""
        key = [job.key, digest(text), number, job.budget.measure]
        kept = trials.get("proof", key)
        if kept is None:
            chosen = contender(job, refiner, proof, rejected)
            if chosen is None:
                proof.reason = proof.reason or why_not(job, refiner)
                return proof
            with job.stage("proof"):
                kept = evaluate(job, refiner, chosen, text, number)
            trials.put("proof", key, kept)
            trials.made += 1
        else:
            chosen = refiner.measure(kept["name"], choices(kept["choices"]), kept["allowance"])
            trials.reused += 1
        reading = Reading(**kept["reading"])
        attempt = Attempt(chosen.name, reading, reading.within(job.budget), kept["figures"])
        proof.attempts.append(attempt)
        if attempt.holds and confirmed(job, refiner, proof, chosen):
            proof.chosen = chosen
            proof.reason = ""
            return proof
        rejected += [t.name for t in refiner.tried if t.choices == chosen.choices]
        if not attempt.holds:
            rejected += refuse(job, refiner, chosen, attempt, number, number == len(slices))
    proof.reason = proof.reason or (
        f"no candidate was proven within the budget {job.budget} in {len(slices)} "
        f"attempt{'s' * (len(slices) > 1)}: more evaluation text or a larger budget may help"
    )
    return proof


def refuse(job: Job, refiner: Refiner, chosen: Tried, attempt: Attempt, number: int, last: bool) -> list[str]:
    """Says what failed, allocates a more careful candidate, and names those that are not worth another attempt."""
    reading = attempt.reading
    job.say(
        f"{chosen.name} does not hold the budget {job.budget} on held-out text: the upper end of its "
        f"{reading.level:.0%} interval is {shown(job, reading.high)}"
    )
    doubtful = chosen.reading.estimate - 0.1 * abs(chosen.reading.estimate)
    names = [t.name for t in refiner.tried if t.reading.estimate >= doubtful]
    if not last:
        allowance = chosen.allowance or job.budget.nats
        shrink = min(0.8, max(0.1, 0.9 * job.budget.limit / reading.high))
        with job.stage("search"):
            refiner.allocated(f"more careful {number}", allowance * shrink)
    return names


def contender(job: Job, refiner: Refiner, proof: Proof, rejected: list[str]) -> Tried | None:
    """The fastest that is still faster when timed again: the first times chose it, so they flatter it."""
    while True:
        with job.stage("timing candidates"):
            chosen = fastest(job, refiner, proof, rejected)
        if chosen is None or confirmed(job, refiner, proof, chosen):
            return chosen
        rejected.append(chosen.name)


def confirmed(job: Job, refiner: Refiner, proof: Proof, chosen: Tried) -> bool:
    """Times a candidate for the report, once, and says whether it is better than the original by that."""
    if chosen.name not in proof.final:
        with job.stage("timing"):
            run, (own,) = speed.compare(
                job.graph,
                job.original,
                [refiner.model(chosen.choices)],
                threads=job.threads,
                rounds=FINAL_ROUNDS,
                report=job.report,
            )
        proof.final[chosen.name] = run, own
    if job.settings.objective == "memory":
        return chosen.bytes < original_bytes(refiner)
    gain = proof.final[chosen.name][1].gain(job.settings.objective)
    if not gain.holds:
        proof.reason = slower(job, gain)
        job.say(
            f"{chosen.name} is not certainly faster when timed again: {gain.estimate:.2f} times the original's speed "
            f"(95% interval {gain.low:.2f} to {gain.high:.2f})"
        )
    return gain.holds


def slower(job: Job, gain: Gain) -> str:
    return (
        f"nothing is faster within the budget {job.budget}: the best candidate runs at {gain.estimate:.2f} times "
        f"the original's {job.settings.objective} speed (95% interval {gain.low:.2f} to {gain.high:.2f})"
    )


def original_bytes(refiner: Refiner) -> int:
    return refiner.space.bytes({t.name: t.choices[0] for t in refiner.space.tensors})


def choices(facts: dict[str, list[str]]) -> dict[str, Choice]:
    """What `refine.facts` made JSON of."""
    return {name: Choice(*values) for name, values in facts.items()}


def fastest(job: Job, refiner: Refiner, proof: Proof, rejected: Sequence[str]) -> Tried | None:
    """The best for the objective of those that fit, if it is better than the original; timed where time is the aim."""
    fitting = [t for t in refiner.tried if t.fits and t.name not in rejected]
    fitting = sorted(fitting, key=lambda t: (t.cost, t.reading.estimate))[:CONTENDERS]
    if job.settings.objective == "memory":
        return next((t for t in fitting if t.bytes < original_bytes(refiner)), None)
    unknown = [t for t in fitting if t.name not in proof.speeds]
    if unknown:
        weights = [refiner.model(t.choices) for t in unknown]
        _, speeds = speed.compare(
            job.graph, job.original, weights, threads=job.threads, rounds=ROUNDS, report=job.report
        )
        proof.speeds.update({t.name: s for t, s in zip(unknown, speeds, strict=True)})
    gains = {t.name: proof.speeds[t.name].gain(job.settings.objective) for t in fitting}
    faster = [t for t in fitting if gains[t.name].holds]
    if fitting and not faster:
        best = max(gains.values(), key=lambda g: g.estimate)
        proof.reason = slower(job, best)
    return max(faster, key=lambda t: gains[t.name].estimate, default=None)


def why_not(job: Job, refiner: Refiner) -> str:
    if not refiner.tried:
        return f"nothing is faster within the budget {job.budget}: no format is both faster and accurate enough"
    closest = min(refiner.tried, key=lambda t: t.reading.careful(refiner.final_tokens))
    return (
        f"nothing is faster within the budget {job.budget}: the most careful candidate measured is at "
        f"{shown(job, closest.reading.estimate)} (95% interval {shown(job, closest.reading.low)} to "
        f"{shown(job, closest.reading.high)} on {closest.reading.tokens} tokens)"
    )


def shown(job: Job, value: float) -> str:
    """A loss in the budget's unit."""
    return f"{value * 100:+.2f}%" if job.budget.measure == "ppl" else f"{value:.4f} nats"


def evaluate(job: Job, refiner: Refiner, chosen: Tried, text: list[Int32], number: int) -> dict[str, Any]:
    """Original and candidate in lockstep over one slice: the one look at it that there will be."""
    level = LEVELS[min(number, len(LEVELS)) - 1]
    weights = refiner.model(chosen.choices)
    report = lambda _, done, total: job.report("proof on held-out text", done, total)  # noqa: E731
    found = quality.score(job.graph, weights, text, job.original, job.threads, report)
    reading = quality.reading(job.budget, found, level) if found else quality.broken(tokens(text), level)
    return {
        "name": chosen.name,
        "choices": facts(chosen.choices),
        "allowance": chosen.allowance,
        "reading": asdict(reading),
        "figures": figures(found) if found else {"tokens": tokens(text)},
    }


def tokens(text: list[Int32]) -> int:
    """Those that are scored."""
    return sum(len(w) - 1 for w in text)


def figures(found: Evaluation) -> dict[str, Any]:
    assert found.reference_logprobs is not None
    assert found.kl_divergence is not None
    before = interval([-w for w in found.reference_logprobs], np.exp)
    return {
        "before": {"perplexity": before.estimate, "ci95": [finite(before.low), finite(before.high)]},
        "after": {
            "perplexity": finite(found.perplexity),
            "ci95": [finite(v) for v in found.ci95] if found.ci95 else None,
        },
        "kl_divergence": finite(found.kl_divergence),
        "top1_agreement": found.top1_agreement,
        "tokens": found.tokens,
    }
