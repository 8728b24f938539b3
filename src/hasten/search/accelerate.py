"""`accelerate`: a model goes in, and a measurably faster one within a stated quality comes out, or the news of none.

Interrupted and started again, it continues: every measurement is on disk as soon as it is made.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hasten.backends.batch import Int32
from hasten.bench.latency import Run
from hasten.compress import calibrate
from hasten.compress.run import Packer
from hasten.compress.statistics import Statistics
from hasten.engine import memory
from hasten.errors import OutputError
from hasten.evaluate import perplexity
from hasten.search import (
    caches,
    cap,
    cost,
    deliver,
    document,
    domains,
    evidence,
    history,
    quality,
    samples,
    schedule,
    sensitivity,
    speed,
    structures,
    target,
    texts,
    whole,
    widths,
)
from hasten.search.candidates import tensors
from hasten.search.clock import Clock
from hasten.search.cost import Site
from hasten.search.job import Job, Note, Report, Settings, prepare, work_folder
from hasten.search.prove import Proof, prove
from hasten.search.quality import Bounds, Judge
from hasten.search.refine import ROUNDS, Refiner, Space
from hasten.search.samples import Sample
from hasten.search.structures import Shape
from hasten.search.trials import Trials, digest

CHEAPER = 0.98
"""Of the cost that the best candidate of the given shape has: another shape must do better than that."""
NOTHING_ELSE = "of the model's own no candidate keeps the budget"
ROUNDS_TIMED = 5
"""In which the best candidates of two shapes are timed."""
FEW = 2
"""Rounds of the search with the whole shape, where another one promises more."""
UNLIKE, UNLIKE_TOKENS = 3.0, 2048
"""Texts whose perplexities are this far apart are not of one kind."""


@dataclass(frozen=True)
class Outcome:
    """`document` is what report.json holds. `output` is None where nothing was written: `reason` says why."""

    document: dict[str, Any]
    output: Path | None
    reason: str = ""


def accelerate(settings: Settings, report: Report, note: Note) -> Outcome:
    """The whole flow. Raises HastenError for input that cannot be used; leaves nothing half-written."""
    clock = Clock(settings.minutes)
    job = prepare(settings, report, note, clock)
    domains.check(job)
    settings = job.settings
    cap.check(job)
    before = target.original(job) if job.objective.target else None
    with Trials(work_folder(settings.output), settings.keep_work) as trials:
        if trials.count():
            note(f"continuing: {trials.count()} measurements of an earlier run are kept in {trials.folder}")
        ask_original(job, trials)
        statistics = calibrated(job, trials)
        compare_texts(job, trials)
        packer = Packer(job.original, job.model.tensor, statistics.inputs, job.packed)
        space, times = explore(job, statistics, packer, trials)
        start = Start(job, packer, space, times)
        each = seconds_per_token(job, trials)
        most = choose_caches(start, statistics, each, trials)
        shape = promising(start, statistics, trials)
        sizes = schedule.text_sizes(job, each, trials)
        slices = texts.slices(job.texts.final, sizes["final"])
        sample, finals = samples.cut(texts.take(job.texts.search, sizes["search"]), slices, job.tasks, job.budget)
        refiner, proof = refine(start, sample, finals[0], most, each, before, trials, FEW if shape else ROUNDS)
        if shape:
            start, refiner = better(start, shape, refiner, sample, finals[0], trials)
            job, packer, times = start.job, start.packer, start.times
        proof = prove(job, refiner, finals, trials, proof)
        if proof.chosen is None:
            made = document.make(job, refiner, proof, times, None)
            remember(job, refiner, made, trials)
            return Outcome(made, None, proof.reason)
        told = evidence.gather(job, refiner, proof, proof.chosen, each, trials)
        made = deliver.write(job, packer, proof, proof.chosen, refiner, times, told, trials.folder / "artifact")
        remember(job, refiner, made, trials)
        deliver.place(trials.folder / "artifact", settings.output)
    return Outcome(made, settings.output)


def calibrated(job: Job, trials: Trials) -> Statistics:
    """Input statistics and last hidden states, from disk where an earlier run left them."""
    context = min(job.graph.context, 512)
    flat = np.concatenate(job.texts.calibration)[: schedule.calibration(job, trials)]
    job.texts = texts.replace_calibration(job.texts, texts.split(flat, context))
    windows = job.texts.calibration
    folder = trials.folder / calibration_name(job, flat)
    fact = [job.key, folder.name, context]
    with job.stage("calibration"):
        if (folder / "statistics.npz").exists() and trials.get("calibration", fact) is not None:
            return Statistics.load(folder)
        statistics = calibrate.calibrate(
            job.graph,
            job.original,
            windows,
            kv_format=job.kv_format,
            hessians=[spec.name for spec in job.graph.matrices()],
            done=lambda found: found.spill(folder),
            threads=job.threads,
            report=job.report,
        )
    kept = len(texts.take(windows, sensitivity.MOST_TOKENS))
    statistics.final = statistics.final[:kept]
    statistics.save(folder)
    trials.put("calibration", fact, {"seconds_per_token": job.seconds["calibration"] / statistics.tokens})
    return statistics


def calibration_name(job: Job, tokens: Int32) -> str:
    shape = f"-{digest(job.shape)[:8]}" if job.shape else ""
    return f"calibration-{texts.digest([tokens])}{shape}"


def ask_original(job: Job, trials: Trials) -> None:
    """A task that the original cannot do is refused before anything takes long. Raises BudgetError."""
    with job.stage("tasks"):
        for budget in job.budget.tasks:
            assert budget.file is not None
            task, key = samples.searched(job.tasks[budget.file]), [job.key, "original"]
            right = quality.asked(
                task,
                job.graph,
                job.threads,
                trials,
                key,
                lambda: job.original,
                "asking the original",
                job.report,
                job.kv_format,
            )
            if doubt := quality.check_task(budget, task, right):
                job.say(doubt)


def compare_texts(job: Job, trials: Trials) -> None:
    """Warn of a calibration text that is far from what the model, or its evaluation, knows: another language, say."""
    pair = [texts.take(windows, UNLIKE_TOKENS) for windows in (job.texts.calibration, job.texts.search)]

    def make() -> list[float]:
        report = lambda _, done, total: job.report("comparing texts", done, total)  # noqa: E731
        kv = (job.kv_format, job.kv_format)
        found = [quality.score(job.graph, job.original, own, None, job.threads, report, kv_formats=kv) for own in pair]
        return [float(one.perplexity) if one else float("inf") for one in found]

    with job.stage("calibration"):
        own, other = trials.measure("unlike", [job.key, *map(texts.digest, pair)], make)
    if own > UNLIKE * other:
        job.say(
            f"the calibration text is unlike the evaluation text: the original's perplexity is {own:,.1f} on it and "
            f"{other:,.1f} there; text like the model's own use calibrates better"
        )


def seconds_per_token(job: Job, trials: Trials) -> float:
    """Of the original, in chunks: as the first calibration took, so that a run continued decides as it did before."""
    flat = np.concatenate(job.texts.calibration)
    name = calibration_name(job, flat)
    found = trials.get("calibration", [job.key, name, min(job.graph.context, 512)])
    assert found is not None
    return float(found["seconds_per_token"])


def explore(
    job: Job,
    statistics: Statistics,
    packer: Packer,
    trials: Trials,
    only: Container[str] | None = None,
    before: Space | None = None,
) -> tuple[Space, dict[Site, float]]:
    """Every matrix's choices with their costs and losses.

    `only`: the formats that are looked at, besides its own; `before`: of the model that was given.
    """
    found = tensors(job.graph, job.original)
    if only is not None:
        found = [replace(t, choices=tuple(c for c in t.choices if c.is_original or c.format in only)) for t in found]
    key = [job.key, texts.digest(job.texts.calibration)]
    with job.stage("candidates"):
        found = schedule.trimmed(job, found, packer, trials)
        errors = sensitivity.errors(found, packer, trials, key, job.report)
        found = sensitivity.holdable(found, errors)
    with job.stage("timing kernels"):
        objective = job.objective
        times = cost.measure(found, objective, job.threads, trials, job.kernels, job.report)
        costs = [cost.costs(t, objective, times) for t in found]
        known = whole.measure(job, found, costs, trials, before) if objective.phases else None
    with job.stage("sensitivity"):
        available = sum(len(w) for w in statistics.final)
        plan = schedule.sensitivities(job, found, seconds_per_token(job, trials), available, trials)
        windows = job.texts.calibration[: len(statistics.final)]
        limits = perplexity.limits_for(job.graph, windows, kv_format=job.kv_format, threads=job.threads)
        until = (1 - 1.25 * schedule.SENSITIVITY) * job.clock.left()
        measured = sensitivity.measure(
            job.graph,
            job.original,
            found,
            windows,
            statistics.final,
            packer,
            plan,
            trials,
            key,
            job.report,
            limits,
            lambda: not job.clock.limited or job.clock.left() > until,
        )
    losses = sensitivity.estimate(found, measured, errors)
    costs = known.scaled(found, costs) if known else costs
    rows = [[losses[t.name, c] for c in t.choices] for t in found]
    return Space(found, costs, rows, before=before, whole=known), times


@dataclass(frozen=True)
class Start:
    """What candidates are made of: a shape of the model, with its matrices' choices."""

    job: Job
    packer: Packer
    space: Space
    times: dict[Site, float]


def promising(start: Start, statistics: Statistics, trials: Trials) -> Shape | None:
    """Another shape of the model that is likely cheaper within the budget: a narrower one, or one with a block less."""
    job, space = start.job, start.space
    if job.settings.keep_shape or job.objective.target or job.model.structure or not schedule.shapes(job, trials):
        return None
    with job.stage("shapes"):
        key = [job.key, texts.digest(job.texts.calibration)]
        known = widths.find(job.graph, statistics, space, start.packer, trials, key, job.report)
        found = structures.candidates(job, trials, widths=known, space=space)
        nats = job.budget.nats
        usable = [shape for shape in found if shape.refused is None]
        promises = [structures.promise(space, job.graph, s.structure, s.loss, nats) for s in usable]
    best = min(promises, default=math.inf)
    chosen = usable[promises.index(best)] if best < CHEAPER else None
    job.shapes += [{**shape.json(), "searched": shape is chosen} for shape in found]
    return chosen


def better(
    start: Start, shape: Shape, refiner: Refiner, sample: Sample, final: Sample, trials: Trials
) -> tuple[Start, Refiner]:
    """Where the search ends: `start`, or another shape of the model, if that came out cheaper.

    It must be clearly cheaper by its best candidate that fits: a shape of its own is one that others cannot serve.
    """
    job = start.job
    with job.stage("shapes"):
        other = job.starting(shape.model, {"name": shape.name, "recipe": dict(shape.recipe), **shape.json()})
    statistics = calibrated(other, trials)
    packer = Packer(other.original, other.model.tensor, statistics.inputs, other.packed // 2)
    # What a candidate of the whole shape is made of: other formats have had their chance.
    only = {"int8-g64", *(c.format for c in structures.likely(start.space, job.budget.nats).values())}
    space, times = explore(other, statistics, packer, trials, only, start.space)
    begun = Start(other, packer, space, times)
    each = seconds_per_token(other, trials)
    if job.caches and not job.caches["chosen"] and job.objective.cap is None:
        other.caches, most = job.caches, None  # what all of it refused, less of it will not need
    else:
        most = choose_caches(begun, statistics, each, trials)
    tried, _ = refine(begun, sample, final, most, each, None, trials)
    if not any(t.fits and t.allowance for t in refiner.tried):  # a few rounds were too few to say what it can do
        with job.stage("search"):
            refiner.search()
    # Kept, so that a search continued proves on its slices what it began to prove.
    texts_used = [sample.digest(), texts.digest(job.texts.calibration)]
    asked = ["ends with", job.key, *texts_used, asdict(job.objective), str(job.budget), job.settings.minutes]
    with job.stage("timing candidates"):
        share = trials.measure("schedule", asked, lambda: cheaper(job, other, refiner, tried))
    loser, name = (refiner, "all of the model") if share < CHEAPER else (tried, shape.name)
    its = job if loser is refiner else other
    for one in loser.tried:
        told = {**document.candidate(its, one, Proof(), loser), "name": f"{one.name}, {name}"}
        job.others.append((told, one.choices))
    if loser is refiner:
        what = "bytes" if job.objective.name == "memory" else "time"
        best = f"its best candidate takes {share:.0%} of the {what} of the model's own best" if share else NOTHING_ELSE
        job.say(f"the search ends with {shape.name}: {best}")
        return begun, tried
    with job.stage("search"):
        refiner.search()
    return start, refiner


def cheaper(job: Job, other: Job, refiner: Refiner, tried: Refiner) -> float:
    """What the best candidate of another shape costs, as a share of the best one's of `job`; 0 where that has none.

    Timed in turn where time is the objective: predictions of two shapes were made apart.
    """
    first, second = (min((t for t in r.tried if t.fits), key=lambda t: t.cost, default=None) for r in (refiner, tried))
    if first is None or second is None:
        return 0.0 if second else 1.0
    if job.objective.name == "memory":
        return second.cost / first.cost
    _, (own,) = speed.compare(
        (job.graph, refiner.model(first.choices)),
        other.graph,
        [tried.model(second.choices)],
        objective=job.objective,
        threads=job.threads,
        rounds=ROUNDS_TIMED,
        report=job.report,
        kv_formats=(job.kv_formats[1], other.kv_formats[1]),
    )
    return 1 / own.gain(job.objective.name).estimate


def choose_caches(start: Start, statistics: Statistics, each: float, trials: Trials) -> int | None:
    """Sets the cache that all candidates have; returns what the matrices may take beside it."""
    job = start.job
    with job.stage("caches"):
        likely = lambda: start.packer.model(start.space.uniform(caches.LIKELY))  # noqa: E731
        found = caches.choose(job, statistics.final, likely, each, trials)
    job.caches = found.json()
    if found.chosen:
        job.cache = memory.kv_format((), found.formats)
    return None if job.objective.cap is None else job.objective.cap - cap.serving(job).total


def refine(
    start: Start,
    sample: Sample,
    final: Sample,
    most: int | None,
    each: float,
    before: Run | None,
    trials: Trials,
    rounds: int = ROUNDS,
) -> tuple[Refiner, Proof]:
    """Candidates measured on the search's sample, and what is known of their speeds."""
    job, space, packer = start.job, start.space, start.packer
    key = [job.key, sample.digest(), texts.digest(job.texts.calibration), job.cache]
    graph, original = job.reference
    first = graph if job.shape else None
    judge = Judge(
        job.graph,
        original,
        sample,
        job.budget,
        job.threads,
        trials,
        key,
        job.report,
        job.given_key,
        first,
        job.kv_formats,
    )
    refiner = Refiner(space, judge, packer.model, Bounds(job.budget, final.sizes(job.budget)), most, [])
    later = schedule.reserve(job, each, final.tokens)
    refiner.enough_time = lambda: job.clock.left() > later + refiner.slowest
    proof = Proof()
    with job.stage("search"):
        if before:
            target.reach(job, refiner, proof, before)
        else:
            refiner.uniforms()
            refiner.search(rounds)
    return refiner, proof


def remember(job: Job, refiner: Refiner, made: dict[str, Any], trials: Trials) -> None:
    """For `hasten trials`. A history that cannot be kept is no reason to lose what was found."""
    asked = [made["budget"]["text"], made["aim"], job.settings.minutes]
    run = trials.measure("run", asked, lambda: [uuid.uuid4().hex, datetime.now(UTC).isoformat(timespec="seconds")])
    choices = {t.name: t.choices for t in refiner.tried} | {told["name"]: own for told, own in job.others}
    try:
        history.record(run[0], made, str(job.key[1]), choices, run[1])
    except OutputError as error:
        job.say(f"this search is not in `hasten trials`: {error.message}")
