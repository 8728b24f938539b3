"""How far a whole candidate stands from the original, in the budget's own terms, with how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from hasten.backends.batch import Float32, Int32
from hasten.compress.calibrate import Weights
from hasten.errors import CheckpointError
from hasten.evaluate import paired, perplexity
from hasten.evaluate.bootstrap import Interval, interval
from hasten.evaluate.perplexity import Evaluation
from hasten.graph.graph import Graph
from hasten.search.budget import Budget
from hasten.search.trials import Json, Trials

Report = Callable[[str, int, int], None]
Z95 = 1.96
LIKELY = 1.64
"""One-sided: nineteen times in twenty."""


@dataclass(frozen=True)
class Reading:
    """The loss of a candidate and its interval: growth of perplexity (0.01 is 1%), or nats a token.

    Infinite where the candidate's output is not a number.
    """

    estimate: float
    low: float
    high: float
    tokens: int
    level: float = 0.95
    """Of the interval."""

    def json(self) -> Json:
        """For documents: what is infinite becomes null."""
        return {name: finite(value) for name, value in asdict(self).items()}

    def within(self, budget: Budget) -> bool:
        """The budget holds where even the upper end of the interval keeps it."""
        return self.high <= budget.limit

    def careful(self, tokens: int) -> float:
        """The upper end that another text of `tokens` tokens will stay below, nineteen times in twenty."""
        if not math.isfinite(self.high - self.low):
            return math.inf
        own = (self.high - self.low) / (2 * Z95)
        other = own * math.sqrt(self.tokens / tokens)
        return self.estimate + Z95 * other + LIKELY * math.hypot(own, other)


def broken(tokens: int, level: float = 0.95) -> Reading:
    """Of a candidate whose output is not a number."""
    return Reading(math.inf, -math.inf, math.inf, tokens, level)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def reading(budget: Budget, evaluation: Evaluation, level: float = 0.95) -> Reading:
    """Of an evaluation made beside the original as its reference. Raises CheckpointError where the original broke."""
    assert evaluation.reference_logprobs is not None
    if not all(np.isfinite(w).all() for w in evaluation.reference_logprobs):
        raise CheckpointError("the model's log-probabilities are not finite", "its weights may be damaged")
    if budget.measure == "ppl":
        return ratio_reading(evaluation.reference_logprobs, evaluation.logprobs, level)
    assert evaluation.divergences is not None
    if not all(np.isfinite(w).all() for w in evaluation.divergences):
        return broken(evaluation.tokens, level)
    return _reading(interval(evaluation.divergences, level=level), evaluation.tokens, level)


def ratio_reading(original: Sequence[Float32], candidate: Sequence[Float32], level: float = 0.95) -> Reading:
    with np.errstate(over="ignore"):
        found = paired.difference(original, candidate, level=level)
    shifted = Interval(found.estimate - 1, found.low - 1, found.high - 1)
    return _reading(shifted, sum(len(w) for w in candidate), level)


def _reading(found: Interval, tokens: int, level: float) -> Reading:
    if not math.isfinite(found.estimate):
        return broken(tokens, level)
    return Reading(found.estimate, found.low, found.high, tokens, level)


def score(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    reference: Weights | None,
    threads: int,
    report: Callable[[str, int, int], None],
) -> Evaluation | None:
    """`weights` measured on a text, beside `reference` where given; None where their output is not a number."""
    try:
        with np.errstate(over="ignore"):
            return perplexity.measure(
                graph,
                weights,
                windows,
                reference=(graph, reference) if reference else None,
                threads=threads,
                report=report,
            )
    except CheckpointError:
        return None


@dataclass(frozen=True)
class Judge:
    """Measures candidates on one text, beside the original. The original is scored once."""

    graph: Graph
    original: Weights
    windows: Sequence[Int32]
    budget: Budget
    threads: int
    trials: Trials
    key: Json
    report: Report

    @cached_property
    def _original_logprobs(self) -> list[Float32]:
        found = self._score("scoring the original", self.original, None)
        if found is None:
            raise CheckpointError("the model's log-probabilities are not finite", "its weights may be damaged")
        return found.logprobs

    def read(self, name: str, facts: Json, weights: Callable[[], Weights]) -> Reading:
        """The reading of the candidate that `weights()` makes; `facts` say which it is."""

        def make() -> Json:
            ratio = self.budget.measure == "ppl"
            original = self._original_logprobs if ratio else []
            found = self._score(f"scoring {name}", weights(), None if ratio else self.original)
            if found is None:
                return asdict(broken(sum(len(w) - 1 for w in self.windows)))
            return asdict(ratio_reading(original, found.logprobs) if ratio else reading(self.budget, found))

        found = self.trials.measure("quality", [self.key, self.budget.measure, facts], make)
        return Reading(**found)

    def _score(self, stage: str, weights: Weights, reference: Weights | None) -> Evaluation | None:
        report = lambda _, done, total: self.report(stage, done, total)  # noqa: E731
        return score(self.graph, weights, self.windows, reference, self.threads, report)
