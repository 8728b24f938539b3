"""The format of keys and values in each layer's cache, chosen before candidates are measured, which then all have it.

Each layer's loss in fewer bits is measured alone (compress/kv.py); a knapsack saves the most bytes with losses that add
up to a small share of the budget, so the matrices keep the rest. Where speed is the objective, the choice is timed in
turn with the cache as it is, under weights like those that will come of the search, and refused if it buys little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hasten.backends import cache
from hasten.backends.cache import KvFormat
from hasten.compress import kv
from hasten.compress.calibrate import Weights
from hasten.compress.statistics import Hidden
from hasten.engine import memory
from hasten.search import speed, texts
from hasten.search.job import Job
from hasten.search.trials import Trials

SHARE = 0.1
"""Of the budget that caches may use up."""
LEAST_GAIN = 1.03
"""What matrices buy for as much of a budget, about."""
TOKENS = 1024
ROUNDS = 5
LIKELY = "int4-g64"
"""Format of the matrices that caches are timed with."""
MOST = 0.1
"""Of the time left, that measuring them may take."""


@dataclass(frozen=True)
class Caches:
    """`formats`: of each layer, the original's where none was chosen; bytes are of a token, all layers together."""

    formats: tuple[str, ...]
    before: int
    after: int
    loss: float = 0.0
    """The sum of its layers' losses, nats a token."""
    gain: speed.Gain | None = None
    """Times the speed, where that counts."""
    refused: str | None = None

    @property
    def chosen(self) -> bool:
        return self.refused is None

    def json(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "formats": memory.shown_format(self.formats),
            "layers": list(self.formats),
            "bytes_before": self.before,
            "bytes_after": self.after,
            "loss": self.loss,
            "gain": asdict(self.gain) if self.gain else None,
            "refused": self.refused,
        }


def choose(job: Job, final: Hidden, weights: Callable[[], Weights], each: float, trials: Trials) -> Caches:
    """The caches that the candidates are to have.

    `final`: the original's last hidden states of the calibration's first windows; `weights()`: those to be timed with.
    `each`: seconds that the original takes for a token.
    """
    graph, original = job.graph, cache.formats_of(job.graph, job.kv_format)
    windows = texts.take(job.texts.calibration[: len(final)], TOKENS)
    before = memory.kv_bytes(graph, original)
    key = [job.key, texts.digest(windows), list(original)]

    def why_not() -> str | None:
        tokens, passes = sum(len(w) for w in windows), len(kv.FORMATS) * len(graph.blocks) / 2
        if not math.isfinite(job.budget.nats):
            return "without a budget nothing says what they may lose"
        if job.objective.name == "memory" and job.objective.cap is None:
            return "the objective counts the bytes of matrices"
        if job.clock.limited and passes * tokens * each > MOST * job.clock.left():
            return "there is no time to measure them"
        return None

    (refused,) = trials.measure(
        "schedule", ["caches", *key, asdict(job.objective), str(job.budget)], lambda: [why_not()]
    )
    if refused:
        return Caches(original, before, before, refused=refused)
    # f32 is the cache of models in f32 only: their candidates' is bf16, unless it is in fewer bits.
    plain: KvFormat = "bf16" if job.kv_format == "f32" else job.kv_format

    def measured() -> list[Any]:
        losses = kv.measure(
            graph,
            job.original,
            windows,
            kv_format=plain,
            final=final if plain == job.kv_format else None,
            threads=job.threads,
            report=job.report,
        )
        return [[layer, name, loss] for (layer, name), loss in losses.items()]

    losses = {(layer, name): loss for layer, name, loss in trials.measure("caches", key, measured)}
    formats = kv.choose(graph, losses, SHARE * job.budget.nats, plain)
    after = memory.kv_bytes(graph, formats)
    loss = sum(losses.get(place, 0.0) for place in enumerate(formats))
    if after >= memory.kv_bytes(graph, plain):
        return Caches(original, before, before, refused="no layer bears fewer bits")
    if job.objective.cap is not None:
        return Caches(formats, before, after, loss)
    gain = timed(job, weights, plain, formats, [key, formats], trials)
    shown = f"{gain.estimate:.2f} times ({gain.low:.2f} to {gain.high:.2f})"
    worth = gain.holds and gain.estimate >= LEAST_GAIN
    return Caches(formats, before, after, loss, gain, None if worth else f"it buys too little speed: {shown}")


def timed(
    job: Job, weights: Callable[[], Weights], plain: KvFormat, formats: KvFormat, key: Any, trials: Trials
) -> speed.Gain:
    """How much faster `formats` make the objective than `plain`."""

    def compare() -> dict[str, float]:
        made = weights()
        _, (found,) = speed.compare(
            (job.graph, made),
            job.graph,
            [made],
            objective=job.objective,
            threads=job.threads,
            rounds=ROUNDS,
            report=job.report,
            kv_formats=(plain, formats),
        )
        return asdict(found.gain(job.objective.name))

    return speed.Gain(**trials.measure("cache speed", [key, job.kernels, asdict(job.objective)], compare))
