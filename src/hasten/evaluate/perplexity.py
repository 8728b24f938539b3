"""Perplexity, and divergence from a reference, through the program that serves.

Every window starts from an empty cache; every token but its first is scored. Where a reference is given both models
read the same tokens in lockstep, so the divergence is over the whole vocabulary and no logits are ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.backends import feed
from hasten.backends.batch import Float32, Int32, Limits, Program
from hasten.backends.cache import KvFormat
from hasten.engine import memory
from hasten.errors import CheckpointError, InputError
from hasten.evaluate import paired
from hasten.evaluate.bootstrap import Interval, interval
from hasten.formats import Weight
from hasten.graph.graph import Graph

Weights = Mapping[str, Weight | Float32]
Report = Callable[[str, int, int], None]

LOGITS_AT_ONCE = 2**24
"""Floats (64 MiB): a chunk's rows times the vocabulary stay below it."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text. `kl_divergence` and what follows are there only with a reference."""

    perplexity: float
    ci95: tuple[float, float] | None
    """Of the perplexity; None where a single token was scored."""
    tokens: int
    """Scored ones."""
    kl_divergence: float | None
    """Mean KL(reference || model) over the whole vocabulary, in nats a token."""
    top1_agreement: float | None
    """Share of tokens at which both models' most likely token is the same."""
    logprobs: list[Float32]
    """One array a window: natural logarithms of the probability of each scored token."""
    reference_logprobs: list[Float32] | None = None
    divergences: list[npt.NDArray[np.float64]] | None = None
    agreements: list[npt.NDArray[np.bool_]] | None = None
    """One array a window: whether both models' most likely token is the same."""

    @property
    def ratio(self) -> Interval | None:
        """perplexity / the reference's, paired token by token."""
        return paired.difference(self.reference_logprobs, self.logprobs) if self.reference_logprobs else None

    def summary(self) -> dict[str, Any]:
        """The figures, by the names that `hasten eval --json` prints."""
        return {
            "perplexity": self.perplexity,
            "ci95": list(self.ci95) if self.ci95 else None,
            "tokens": self.tokens,
            "kl_divergence": self.kl_divergence,
            "top1_agreement": self.top1_agreement,
            "perplexity_ratio": [r.estimate, r.low, r.high] if (r := self.ratio) and math.isfinite(r.high) else None,
        }


def limits_for(graph: Graph, windows: Sequence[Int32], *, kv_format: KvFormat = "bf16", threads: int = 0) -> Limits:
    """Limits of a program that scores `windows`: few enough rows at once for their logits to stay small."""
    chunk = max(32, min(256, LOGITS_AT_ONCE // max(graph.vocabulary, 1)))
    return feed.window_limits(max(len(w) for w in windows), chunk, kv_format=kv_format, threads=threads)


def predict(
    models: Sequence[tuple[Graph, Mapping[str, str]]],
    windows: Sequence[Int32],
    kv_format: KvFormat = "auto",
    reference_kv_format: KvFormat = "auto",
) -> memory.Prediction:
    """What measuring `models` (graph, format of each matrix) together takes: a model, and perhaps its reference."""
    parts = [
        memory.predict(
            graph,
            memory.weight_bytes(graph, stored),
            limits_for(graph, windows, kv_format=memory.kv_format(stored.values(), asked)),
        )
        for (graph, stored), asked in zip(models, (kv_format, reference_kv_format), strict=False)
    ]
    return memory.Prediction(*(sum(column) for column in zip(*(astuple(p) for p in parts), strict=True)))


def measure(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    *,
    reference: tuple[Graph, Weights] | None = None,
    kv_format: KvFormat = "auto",
    reference_kv_format: KvFormat = "auto",
    threads: int = 0,
    report: Report | None = None,
) -> Evaluation:
    """Score `windows` with a graph and its weights. `kv_format` is of its cache; "auto" is what a model of such weights
    is served with, where it is no artifact with a choice of its own.

    Raises as `score` does, InputError where the vocabularies differ, BackendError where the backend cannot run a graph.
    """
    from hasten.backends import native

    if reference and reference[0].vocabulary != graph.vocabulary:
        raise InputError(
            f"the reference's vocabulary has {reference[0].vocabulary} tokens, the model's {graph.vocabulary}",
            "compare models that share a tokenizer",
        )

    def program(graph: Graph, weights: Weights, asked: KvFormat) -> Program:
        kv = memory.kv_format((w.format.name for w in weights.values() if isinstance(w, Weight)), asked)
        return native.compile(graph, weights, limits_for(graph, windows, kv_format=kv, threads=threads), tune=True)

    other = program(*reference, reference_kv_format) if reference else None
    return score(program(graph, weights, kv_format), windows, other, report)


def score(
    program: Program,
    windows: Sequence[Int32],
    reference: Program | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Score `windows` with a compiled program, and a second one in lockstep where `reference` is given.

    Raises InputError where there is nothing to score, CheckpointError where the model's output is not a number.
    """
    total = sum(len(w) - 1 for w in windows)
    if total < 1:
        raise InputError("the text is too short: no token can be scored")
    own: list[list[Float32]] = [[] for _ in windows]
    other: list[list[Float32]] = [[] for _ in windows]
    apart: list[list[npt.NDArray[np.float64]]] = [[] for _ in windows]
    same: list[list[npt.NDArray[np.bool_]]] = [[] for _ in windows]
    done = 0
    for index, start, batch in feed.windows([w[:-1] for w in windows], program.limits):
        targets = windows[index][start + 1 : start + 1 + len(batch.tokens)]  # [rows], what each row should say next
        outputs = program.step(batch)
        own[index].append(outputs.score(targets))
        if reference:
            expected = reference.step(batch)
            other[index].append(expected.score(targets))
            apart[index].append(outputs.divergence(expected))
            same[index].append(outputs.argmax() == expected.argmax())
        done += len(targets)
        if report:
            report("scoring", done, total)
    return _evaluation(own, other if reference else None, apart, same)


def _evaluation(
    own: list[list[Float32]],
    other: list[list[Float32]] | None,
    apart: list[list[npt.NDArray[np.float64]]],
    same: list[list[npt.NDArray[np.bool_]]],
) -> Evaluation:
    logprobs = [np.concatenate(w) for w in own]
    if not all(np.isfinite(w).all() for w in logprobs):
        raise CheckpointError("the model's log-probabilities are not finite", "its weights may be damaged")
    tokens = sum(len(w) for w in logprobs)
    found = interval([-w for w in logprobs], np.exp)
    divergences = [np.concatenate(w) for w in apart] if other else None
    agreements = [np.concatenate(w) for w in same] if other else None
    return Evaluation(
        perplexity=found.estimate,
        ci95=(found.low, found.high) if np.isfinite(found.low) else None,
        tokens=tokens,
        kl_divergence=float(sum(w.sum() for w in divergences) / tokens) if divergences else None,
        top1_agreement=sum(int(np.count_nonzero(w)) for w in agreements) / tokens if agreements else None,
        logprobs=logprobs,
        reference_logprobs=[np.concatenate(w) for w in other] if other else None,
        divergences=divergences,
        agreements=agreements,
    )
