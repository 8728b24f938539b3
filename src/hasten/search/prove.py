"""Chooses the fastest candidate that likely keeps the budget, and proves it on text that nothing has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from hasten.bench.latency import Run
from hasten.compress.calibrate import Weights
from hasten.compress.recipe import Choice
from hasten.engine.memory import size
from hasten.evaluate.bootstrap import interval
from hasten.evaluate.perplexity import Evaluation
from hasten.search import quality, speed
from hasten.search.job import CONTENDERS, Job
from hasten.search.quality import Reading, Readings, finite
from hasten.search.refine import Refiner, Tried, facts
from hasten.search.samples import Sample
from hasten.search.speed import Gain, Speed
from hasten.search.trials import Trials

ROUNDS = 5
FINAL_ROUNDS = 9
MORE_CAREFUL = 3
"""Candidates measured at most after a failure: the first that fits will do."""
LEVELS = (0.95, 0.99)
"""Of the interval whose upper end must keep the budget, on the first and on every later attempt.

With three attempts a candidate beyond the budget is let through in at most 2.5% + 0.5% + 0.5% of searches."""


@dataclass(frozen=True)
class Attempt:
    """One evaluation on a slice of the final text that no earlier one saw."""

    name: str
    readings: Readings
    holds: bool
    figures: dict[str, Any]
    """perplexity and its interval before and after, KL divergence, top-1 agreement; tasks' accuracies."""

    @property
    def reading(self) -> Reading:
        """Of the budget's first part."""
        return self.readings[0]


@dataclass
class Proof:
    """How the choice went. `chosen` is None where nothing faster was proven within the budget: `reason` says why."""

    chosen: Tried | None = None
    reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    speeds: dict[str, Speed] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    """By candidate: the original's run among the same rounds."""
    final: dict[str, tuple[Run, Speed]] = field(default_factory=dict)
    """By candidate: the original's run and its own, of the times that the report shows."""


def prove(job: Job, refiner: Refiner, slices: Sequence[Sample], trials: Trials, proof: Proof | None = None) -> Proof:
    """Up to one attempt a slice; after a failure the next candidate is a more careful one.

    What was tried on a slice is on disk with the outcome. A run continued replays it, whatever clocks say by then: no
    slice is looked at twice. `proof`: with what is known of speeds already.
    """
    proof = proof or Proof()
    rejected: list[str] = []
    measures = sorted({b.measure for b in job.budget.parts})
    for number, sample in enumerate(slices, 1):
        if number > 1 and not refiner.enough_time():
            proof.reason = f"no candidate was proven within the budget {job.budget} in the time given"
            return proof
        proof.reason = ""
        key = [job.key, sample.digest(), number, measures, job.cache]
        kept = trials.get("proof", key)
        if kept is None:
            chosen = contender(job, refiner, proof, rejected)
            if chosen is None:
                proof.reason = proof.reason or why_not(job, refiner)
                return proof
            with job.stage("proof"):
                kept = evaluate(job, refiner, chosen, sample, number)
            trials.put("proof", key, kept)
            trials.made += 1
        else:
            chosen = refiner.measure(kept["name"], choices(kept["choices"]), kept["allowance"])
            trials.reused += 1
        readings = tuple(Reading(**r) for r in kept["readings"])
        attempt = Attempt(chosen.name, readings, refiner.bounds.hold(readings), kept["figures"])
        proof.attempts.append(attempt)
        if attempt.holds and confirmed(job, refiner, proof, chosen):
            proof.chosen = chosen
            proof.reason = ""
            return proof
        rejected += [t.name for t in refiner.tried if t.choices == chosen.choices]
        if not attempt.holds:
            left = slices[number] if number < len(slices) else None
            rejected += refuse(job, refiner, proof, chosen, attempt, left)
    proof.reason = proof.reason or (
        f"no candidate was proven within the budget {job.budget} in {len(slices)} "
        f"attempt{'s' * (len(slices) > 1)}: more evaluation text or a larger budget may help"
    )
    return proof


def refuse(job: Job, refiner: Refiner, proof: Proof, chosen: Tried, attempt: Attempt, left: Sample | None) -> list[str]:
    """Says what failed, allocates more careful candidates until one fits, and names those not worth another attempt."""
    budget, reading = refiner.bounds.worst(attempt.readings)
    job.say(
        f"{chosen.name} does not hold the budget {budget} on held-out text: the upper end of its "
        f"{reading.level:.0%} interval is {budget.show(reading.high)}"
    )
    own = refiner.bounds.estimate(chosen.readings)
    doubtful = own - 0.1 * abs(own)
    names = [t.name for t in refiner.tried if refiner.bounds.estimate(t.readings) >= doubtful]
    if left:
        number, failed = len(proof.attempts), [t.choices for t in refiner.tried if t.name in names]
        # By what the next attempt asks: another slice, at its own level.
        refiner.bounds = replace(
            refiner.bounds, final=left.sizes(job.budget), level=LEVELS[min(number, len(LEVELS) - 1)]
        )
        allowance = chosen.allowance or job.budget.nats
        shrink = min(0.8, max(0.1, 0.9 / refiner.bounds.high(attempt.readings)))
        with job.stage("search"):
            for more in range(MORE_CAREFUL):
                name = f"more careful {number}" + f", {more + 1}" * (more > 0)
                one = refiner.allocated(name, allowance * shrink ** (more + 1)) if refiner.enough_time() else None
                if one and job.objective.target:
                    time(job, refiner, proof, [one])
                if one is None or (one.fits and one.choices not in failed):
                    break
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
    """Times a candidate for the report, once, and says whether it does what was asked by that."""
    if chosen.name not in proof.final:
        with job.stage("timing"):
            run, (own,) = compare(job, refiner, [chosen], FINAL_ROUNDS)
        proof.final[chosen.name] = run, own
    if job.objective.name == "memory":
        return chosen.bytes < refiner.space.original_bytes
    own = proof.final[chosen.name][1]
    if job.objective.target:
        return reached(job, proof, chosen, speed.rate(own.run, job.objective))
    gain = own.gain(job.objective.name)
    if not gain.holds and job.original_allowed:
        proof.reason = slower(job, gain)
        job.say(
            f"{chosen.name} is not certainly faster when timed again: {gain.estimate:.2f} times the original's speed "
            f"(95% interval {gain.low:.2f} to {gain.high:.2f})"
        )
    return gain.holds or not job.original_allowed


def reached(job: Job, proof: Proof, chosen: Tried, rate: float) -> bool:
    target = job.objective.target
    assert target
    if rate < target.rate:
        proof.reason = (
            f"nothing within reach keeps the target {target}: {chosen.name} makes {rate:,.1f} tokens a second"
        )
        job.say(f"{chosen.name} makes {rate:,.1f} tokens a second when timed again: the target is {target}")
    return rate >= target.rate


def compare(job: Job, refiner: Refiner, chosen: Sequence[Tried], rounds: int) -> tuple[Run, list[Speed]]:
    """Candidates timed in turn with the original."""
    return timed(job, [refiner.model(t.choices) for t in chosen], rounds)


def timed(job: Job, candidates: Sequence[Weights], rounds: int) -> tuple[Run, list[Speed]]:
    """The original's run and each candidate's speed, as the objective has them and with the caches that serve them."""
    return speed.compare(
        job.reference,
        job.graph,
        candidates,
        objective=job.objective,
        threads=job.threads,
        rounds=rounds,
        report=job.report,
        kv_formats=job.kv_formats,
    )


def slower(job: Job, gain: Gain) -> str:
    return (
        f"nothing is faster within the budget {job.budget}: the best candidate runs at {gain.estimate:.2f} times "
        f"the original's {job.objective.name} speed (95% interval {gain.low:.2f} to {gain.high:.2f})"
    )


def choices(facts: dict[str, list[str]]) -> dict[str, Choice]:
    """What `refine.facts` made JSON of."""
    return {name: Choice(*values) for name, values in facts.items()}


def fastest(job: Job, refiner: Refiner, proof: Proof, rejected: Sequence[str]) -> Tried | None:
    """The best for the objective of those that fit, if it is better than the original; timed where time is the aim."""
    fitting = [t for t in refiner.tried if t.fits and t.name not in rejected]
    if job.objective.target:
        return most_faithful(job, proof, fitting)
    fitting = sorted(fitting, key=lambda t: (t.cost, t.reading.estimate))[:CONTENDERS]
    if job.objective.name == "memory":
        most = refiner.space.original_bytes
        return next((t for t in fitting if t.bytes < most), None)
    time(job, refiner, proof, [t for t in fitting if t.name not in proof.speeds])
    gains = {t.name: proof.speeds[t.name].gain(job.objective.name) for t in fitting}
    faster = [t for t in fitting if gains[t.name].holds or not job.original_allowed]
    if fitting and not faster:
        best = max(gains.values(), key=lambda g: g.estimate)
        proof.reason = slower(job, best)
    # The greatest gain that is certain: where timing says little, an estimate is luck.
    return max(faster, key=lambda t: gains[t.name].low, default=None)


def time(job: Job, refiner: Refiner, proof: Proof, candidates: Sequence[Tried]) -> None:
    """Of candidates not yet timed, all in turn with the original."""
    if candidates:
        run, speeds = compare(job, refiner, candidates, ROUNDS)
        proof.speeds.update({t.name: s for t, s in zip(candidates, speeds, strict=True)})
        proof.runs.update({t.name: run for t in candidates})


def most_faithful(job: Job, proof: Proof, fitting: Sequence[Tried]) -> Tried | None:
    """Of those that were timed and reach the target, the one of least loss."""
    target = job.objective.target
    assert target
    rates = {t.name: speed.rate(proof.speeds[t.name].run, job.objective) for t in fitting if t.name in proof.speeds}
    enough = [t for t in fitting if rates.get(t.name, 0.0) >= target.rate]
    if rates and not enough:
        name, best = max(rates.items(), key=lambda item: item[1])
        within = f" within the budget {job.budget}" if job.budget.bounded else ""
        proof.reason = (
            f"nothing{within} reaches the target {target}: the fastest, {name}, makes {best:,.1f} tokens a second, the "
            f"original {speed.rate(proof.runs[name], job.objective):,.1f}"
        )
    return min(enough, key=lambda t: t.reading.estimate, default=None)


def why_not(job: Job, refiner: Refiner) -> str:
    better = "smaller" if job.objective.name == "memory" else "faster"
    if not refiner.tried:
        return f"nothing is {better} within the budget {job.budget}: no format is both {better} and accurate enough"
    within = [t for t in refiner.tried if refiner.bounds.fits(t.readings)]
    if refiner.most_bytes is not None and within and not any(t.fits for t in within):
        least = min(t.bytes for t in within) - refiner.most_bytes + (job.objective.cap or 0)
        return (
            f"nothing within the budget {job.budget} keeps the memory cap of {size(job.objective.cap or 0)}: the "
            f"smallest candidate within the budget takes {size(least)}"
        )
    closest = min(refiner.tried, key=lambda t: refiner.bounds.share(t.readings))
    budget, reading = refiner.bounds.worst(closest.readings)
    found = (
        f"the candidate measured that comes closest is at {budget.show(reading.estimate)} ({budget.what}; 95% "
        f"interval {budget.show(reading.low)} to {budget.show(reading.high)} on {reading.tokens} "
        f"{'questions' if budget.file else 'tokens'})"
    )
    if refiner.most_bytes is not None:
        least = closest.bytes - refiner.most_bytes + (job.objective.cap or 0)
        return (
            f"nothing keeps both the budget {job.budget} and the memory cap of {size(job.objective.cap or 0)}: {found}"
            f", and takes {size(least)}"
        )
    return f"nothing is {better} within the budget {job.budget}: {found}"


def evaluate(job: Job, refiner: Refiner, chosen: Tried, sample: Sample, number: int) -> dict[str, Any]:
    """Original and candidate in lockstep over one slice: the one look at it that there will be."""
    level = LEVELS[min(number, len(LEVELS)) - 1]
    weights = refiner.model(chosen.choices)
    report = lambda _, done, total: job.report("proof on held-out text", done, total)  # noqa: E731
    graph, original = job.reference
    found = quality.score(job.graph, weights, sample.windows, original, job.threads, report, graph, job.kv_formats)
    readings = []
    shown: dict[str, Any] = figures(found) if found else {"tokens": sample.tokens}
    for budget in job.budget.parts:
        if budget.file:
            task = sample.tasks[budget.file]
            models = (job.reference, (job.graph, weights))
            pair = [
                task.right(graph, own, job.threads, report, kv)
                for (graph, own), kv in zip(models, job.kv_formats, strict=True)
            ]
            readings.append(quality.task_reading(pair[0], pair[1], level))
            shown.setdefault("tasks", {})[str(budget.file)] = {
                "before": float(pair[0].mean()),
                "after": float(pair[1].mean()),
                "questions": len(task),
            }
        else:
            readings.append(quality.reading(budget, found, level) if found else quality.broken(sample.tokens, level))
    return {
        "name": chosen.name,
        "choices": facts(chosen.choices),
        "allowance": chosen.allowance,
        "readings": [asdict(r) for r in readings],
        "figures": shown,
    }


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
