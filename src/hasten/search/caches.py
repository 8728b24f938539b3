"""The format of keys and values in each layer's cache, chosen before candidates are measured, which then all have it.

Each layer's loss in fewer bits is measured alone (compress/kv.py); a knapsack saves the most bytes with losses that add
up to a small share of the budget, so the matrices keep the rest. Where speed is the objective, the choice is timed in
turn with the cache as it is, under weights like those that will come of the search, and refused if it is not faster.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
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
TOKENS = 1024
ROUNDS = 5
LIKELY = "int4-g64"
"""Format of the matrices that caches are timed with."""
MOST = 0.1
"""Of the time left, that measuring them may take."""


@dataclass(frozen=True)
class Caches:
    """`formats`: of each layer; `saved`: bytes of a token, of `before`. `gain`: times the speed, where that counts."""

    formats: tuple[str, ...]
    before: int
    saved: int
    loss: float
    """The sum of its layers' losses, nats a token."""
    gain: speed.Gain | None = None
    refused: str | None = None

    @property
    def chosen(self) -> bool:
        return self.saved > 0 and self.refused is None

    def json(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "formats": memory.shown_format(self.formats),
            "layers": list(self.formats),
            "bytes_before": self.before,
            "bytes_saved": self.saved,
            "loss": self.loss,
            "gain": asdict(self.gain) if self.gain else None,
            "refused": self.refused,
        }


def choose(job: Job, final: Hidden, weights: Weights, each: float, trials: Trials) -> Caches | None:
    """The caches that the candidates are to have; None where there is no budget to spend, or no time to look.

    `final`: the original's last hidden states of the calibration's first windows; `weights`: those to be timed with.
    `each`: seconds that the original takes for a token.
    """
    if not math.isfinite(job.budget.nats):
        return None
    graph, plain = job.graph, "bf16" if job.kv_format == "f32" else job.kv_format
    before = cache.formats_of(graph, plain)
    windows = texts.take(job.texts.calibration[: len(final)], TOKENS)
    tokens = sum(len(w) for w in windows)
    passes = len(kv.FORMATS) * len(graph.blocks) / 2
    if job.clock.limited and passes * tokens * each > MOST * job.clock.left():
        return None
    key = [job.key, texts.digest(windows), list(before)]

    def measured() -> list[Any]:
        losses = kv.measure(
            graph,
            job.original,
            windows,
            kv_format=before,
            final=final if plain == job.kv_format else None,
            threads=job.threads,
            report=job.report,
        )
        return [[layer, name, loss] for (layer, name), loss in losses.items()]

    losses = {(layer, name): loss for layer, name, loss in trials.measure("caches", key, measured)}
    formats = kv.choose(graph, losses, SHARE * job.budget.nats, before)
    saved = sum(kv.saved_bytes(graph, before, layer, name) for layer, name in enumerate(formats))
    loss = sum(losses.get((layer, name), 0.0) for layer, name in enumerate(formats))
    found = partial(Caches, formats, memory.kv_bytes(graph, before), saved, loss)
    if not saved or job.objective.name == "memory":
        return found()
    gain = timed(job, weights, plain, formats, [key, list(formats)], trials)
    refused = (
        None if gain.holds else f"not certainly faster: {gain.estimate:.2f} times ({gain.low:.2f} to {gain.high:.2f})"
    )
    return found(gain, refused)


def timed(job: Job, weights: Weights, plain: KvFormat, formats: KvFormat, key: Any, trials: Trials) -> speed.Gain:
    """How much faster `formats` make the objective than `plain`."""

    def compare() -> dict[str, float]:
        _, (found,) = speed.compare(
            (job.graph, weights),
            job.graph,
            [weights],
            objective=job.objective,
            threads=job.threads,
            rounds=ROUNDS,
            report=job.report,
            kv_formats=(plain, formats),
        )
        return asdict(found.gain(job.objective.name))

    return speed.Gain(**trials.measure("cache speed", [key, job.kernels, asdict(job.objective)], compare))
