"""What matrices take in a whole model, beside what their kernels take alone.

A kernel timed alone misses what a model around it does: inputs made ready for its format, caches shared with attention,
weights mapped from a file. So the whole model is timed in one format after the other, each in turn with the original,
and a format's times alone are scaled until their sum is what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from hasten import formats
from hasten.bench import latency
from hasten.compress.calibrate import Weights
from hasten.engine import memory
from hasten.search import predict, prove
from hasten.search.candidates import Tensor
from hasten.search.cost import Costs, Whole, names_of
from hasten.search.job import CONTENDERS, Job
from hasten.search.objective import Objective
from hasten.search.refine import Space
from hasten.search.trials import Trials

ROUNDS = 5
FEWEST_NEW = 8
"""Tokens that are decoded at least, where there is no time for all."""
SECONDS, SHARE = 120.0, 0.05
"""That this may take, and of the time left where that has a limit."""
PASSES = 3
"""Times that rounds and warming up take what one round of each would."""
MOST = 5.0
"""Times as much, or as little, as alone: beyond that something else went wrong."""


def measure(job: Job, tensors: Sequence[Tensor], alone: Costs, trials: Trials, before: Space | None = None) -> Whole:
    """Times the model in every format of `tensors`; `alone`: their choices' costs by kernels timed alone.

    `before`: of the model that was given, where this is another shape of it.
    """
    facts = [job.kernels, asdict(job.objective), job.threads]
    key = [job.key, *facts]
    known = before.whole if before else None
    seconds, prompts = trials.measure("whole", [job.given_key, *facts], partial(original, job))  # once for all shapes
    whole = known or Whole(seconds)
    names = sorted({name for t in tensors if t.linears for name in names_of(t)[1:]})
    if not names or (known and not known.scale):  # nothing to time, or nothing of the same kind to compare it with
        return whole
    count = len(names)
    new, most = trials.measure(
        "schedule",
        ["whole", *key, names, job.settings.minutes],
        lambda: [_new(job, whole.seconds, prompts, count), together(job)],
    )
    if not new:
        return whole
    aim, shares = replace(job.objective, new=new), dict[str, float]()
    for start in range(0, count, most):
        some = names[start : start + most]
        make = _shares(job, aim, [_uniform(job, tensors, name) for name in some])
        shares |= dict(zip(some, trials.measure("whole formats", [*key, some, new], make), strict=True))
    if before and known:
        rest = 1 - before.original_cost / known.seconds
        return replace(known, scale={**known.scale, **scales(tensors, alone, known, shares, rest)})
    return fit(tensors, alone, whole.seconds, shares)


def original(job: Job) -> tuple[float, float]:
    """Seconds of the objective's phases, and of a round's prompts."""
    run, _ = prove.timed(job, [], ROUNDS)
    prompts = job.objective.batch * job.objective.prompt / run.prefill_tokens_per_second
    return predict.seconds(run, job.objective), prompts


def together(job: Job) -> int:
    """How many models are timed in the same rounds: as many as memory holds, for what is timed apart is in another
    state of the machine. Their packed matrices and the packer's share what may be kept."""
    aim = job.objective
    limits = latency.limits_for(job.graph, aim.prompt, aim.new, aim.batch, job.threads, "bf16")
    each = 2 * job.graph.parameters() + memory.predict(job.graph, 0, limits).total
    return max(CONTENDERS, job.packed // 2 // each)


def _shares(job: Job, aim: Objective, candidates: Sequence[Callable[[], Weights]]) -> Callable[[], list[float]]:
    def make() -> list[float]:
        _, speeds = prove.timed(replace(job, objective=aim), [weights() for weights in candidates], ROUNDS)
        return [1 / one.gain(aim.name).estimate for one in speeds]

    return make


def _new(job: Job, seconds: float, prompts: float, formats: int) -> int:
    """How many tokens are decoded in each round: 0 where there is no time for any.

    `seconds`: of the objective's phases; `prompts`: of a round's prompts, which come before any decoding.
    """
    aim = job.objective
    most = SECONDS if not job.clock.limited else min(SECONDS, SHARE * job.clock.left())
    models = formats + -(-formats // CONTENDERS)
    each = most / (PASSES * ROUNDS * models) - prompts
    if aim.name != "decode":
        return aim.new if seconds < each else 0
    new = int(each / max(seconds, 1e-9))
    return min(aim.new, new) if new >= min(aim.new, FEWEST_NEW) else 0


def _uniform(job: Job, tensors: Sequence[Tensor], name: str) -> Callable[[], Weights]:
    """Every matrix that has the choice in one format."""
    chosen = {t.name: name for t in tensors if t.linears and name in names_of(t)[1:]}
    return lambda: rounded(job, chosen)


def rounded(job: Job, chosen: Mapping[str, str]) -> Weights:
    """The model with matrices in the formats `chosen`, to be timed: nearest rounding will do, a method changes no time.

    Raises FormatError where a format cannot hold a matrix.
    """
    return {**job.original, **{n: formats.get(f).pack(job.model.tensor(n)) for n, f in chosen.items()}}


def fit(tensors: Sequence[Tensor], alone: Costs, seconds: float, shares: Mapping[str, float]) -> Whole:
    """The factors that make the sums of `alone` come out as measured.

    `shares`: by format, what the model takes in it, as a share of the original's `seconds`. Of the rest, which no
    matrix takes, only its bounds are known: the one is taken that asks for the least scaling, in logarithms.
    """
    total = sum(row[0] for row in alone)
    if not total > 0:
        return Whole(seconds)
    best: tuple[float, Whole] = (math.inf, Whole(seconds))
    for rest in map(float, np.linspace(0.0, 0.98 * min(1.0, *shares.values()), 99)):
        dense = (1 - rest) * seconds / total
        found = Whole(seconds, own={t.format: dense for t in tensors})
        found = replace(found, scale=scales(tensors, alone, found, shares, rest))
        effort = sum(math.log(v) ** 2 for v in (dense, *found.scale.values()))
        best = min(best, (effort, found), key=lambda one: one[0])
    return best[1]


def scales(
    tensors: Sequence[Tensor], alone: Costs, known: Whole, shares: Mapping[str, float], rest: float
) -> dict[str, float]:
    """The factors of the formats of `shares`, where the rest is known, and what a matrix takes that stays as it was."""
    found = {}
    rows = [(row[0] * known.own.get(t.format, 1.0), row, names_of(t)) for t, row in zip(tensors, alone, strict=True)]
    for format, share in shares.items():
        changed = sum(row[names.index(format, 1)] for _, row, names in rows if format in names[1:])
        kept = sum(own for own, _, names in rows if format not in names[1:])
        if changed > 0:
            factor = ((share - rest) * known.seconds - kept) / changed
            found[format] = min(max(factor, 1 / MOST), MOST)
    return found
