"""How far a whole candidate stands from the original, in the budget's own terms, with how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from hasten.backends.batch import Float32, Int32
from hasten.backends.cache import KvFormat
from hasten.compress.calibrate import Weights
from hasten.errors import BudgetError, CheckpointError
from hasten.evaluate import paired, perplexity
from hasten.evaluate.bootstrap import Interval, interval
from hasten.evaluate.perplexity import Evaluation
from hasten.evaluate.tasks import Task
from hasten.graph.graph import Graph
from hasten.search.budget import Budget, Budgets
from hasten.search.samples import Sample
from hasten.search.trials import Json, Trials

Report = Callable[[str, int, int], None]
KvFormats = tuple[KvFormat, KvFormat]
"""Of the original's cache and the candidate's."""
AUTO: KvFormats = ("auto", "auto")
Z95 = 1.96
LIKELY = 1.64
"""One-sided: nineteen times in twenty."""
NONE_SEEN = 3.7
"""What was never seen in n draws has a share below this / n, in 97.5% of cases (the rule of three)."""


@dataclass(frozen=True)
class Reading:
    """The loss of a candidate and its interval, as its budget measures it (`hasten.search.budget`).

    Infinite where the candidate's output is not a number.
    """

    estimate: float
    low: float
    high: float
    tokens: int
    """That were scored; a task's questions."""
    level: float = 0.95
    """Of the interval."""

    def json(self) -> Json:
        """For documents: what is infinite becomes null."""
        return {name: finite(value) for name, value in asdict(self).items()}

    def within(self, budget: Budget) -> bool:
        """The budget holds where even the upper end of the interval keeps it."""
        return math.isfinite(self.estimate) and self.high <= budget.limit

    def careful(self, tokens: int, level: float = 0.95) -> float:
        """The upper end at `level` that another text of `tokens` tokens will stay below, nineteen times in twenty."""
        if not math.isfinite(self.high - self.low):
            return math.inf
        own = (self.high - self.low) / (2 * Z95)
        other = own * math.sqrt(self.tokens / tokens)
        return self.estimate + NormalDist().inv_cdf((1 + level) / 2) * other + LIKELY * math.hypot(own, other)


Readings = tuple[Reading, ...]
"""One for each part of the budget."""


@dataclass(frozen=True)
class Bounds:
    """The budget beside what there will be to prove it on: tokens or questions for each part."""

    budgets: Budgets
    final: tuple[int, ...]
    level: float = 0.95
    """Of the interval that will be asked for there."""

    def fits(self, readings: Readings) -> bool:
        """Will likely be proven within every part of the budget."""
        parts = zip(self.budgets.parts, readings, self.final, strict=True)
        return all(math.isfinite(r.estimate) and r.careful(n, self.level) <= b.limit for b, r, n in parts)

    def share(self, readings: Readings) -> float:
        """Of the budget, what the careful readings use up, by the part that is worst off: 1 is all of it."""
        parts = zip(self.budgets.parts, readings, self.final, strict=True)
        return max(share(r.careful(n, self.level), b) for b, r, n in parts)

    def estimate(self, readings: Readings) -> float:
        """The same of the estimates; without a limit, the first one itself."""
        if not self.budgets.bounded:
            return readings[0].estimate
        return max(share(r.estimate, b) for b, r in zip(self.budgets.parts, readings, strict=True))

    def hold(self, readings: Readings) -> bool:
        return all(r.within(b) for b, r in zip(self.budgets.parts, readings, strict=True))

    def high(self, readings: Readings) -> float:
        """What the upper ends use up of the budget."""
        return max(share(r.high, b) for b, r in zip(self.budgets.parts, readings, strict=True))

    def worst(self, readings: Readings) -> tuple[Budget, Reading]:
        """The part that is worst off by the upper end."""
        pairs = zip(self.budgets.parts, readings, strict=True)
        return max(pairs, key=lambda p: share(p[1].high, p[0]))


def share(loss: float, budget: Budget) -> float:
    if math.isinf(budget.limit):
        return 0.0 if math.isfinite(loss) else math.inf
    if budget.limit == 0:
        return 0.0 if loss == 0 else math.copysign(math.inf, loss)
    return loss / budget.limit


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
    if budget.measure == "agree":
        assert evaluation.agreements is not None
        return agreement_reading(evaluation.agreements, level)
    return _reading(interval(evaluation.divergences, level=level), evaluation.tokens, level)


def ratio_reading(original: Sequence[Float32], candidate: Sequence[Float32], level: float = 0.95) -> Reading:
    with np.errstate(over="ignore"):
        found = paired.difference(original, candidate, level=level)
    shifted = Interval(found.estimate - 1, found.low - 1, found.high - 1)
    return _reading(shifted, sum(len(w) for w in candidate), level)


def agreement_reading(same: Sequence[npt.NDArray[np.bool_]], level: float = 0.95) -> Reading:
    """The share of tokens at which the most likely one is another. None seen is not none there is."""
    tokens = sum(len(w) for w in same)
    found = interval([1.0 - w for w in same], level=level)
    return _reading(Interval(found.estimate, found.low, max(found.high, NONE_SEEN / tokens)), tokens, level)


def task_reading(original: npt.NDArray[np.bool_], candidate: npt.NDArray[np.bool_], level: float = 0.95) -> Reading:
    """The share of questions answered right that is lost."""
    return _reading(paired.accuracy_lost(original, candidate, level), len(original), level)


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
    reference_graph: Graph | None = None,
    kv_formats: KvFormats = AUTO,
) -> Evaluation | None:
    """`weights` measured on a text, beside `reference` where given; None where their output is not a number.

    `reference_graph`: of `reference`, where it is another. `kv_formats`: of its cache and of the one measured.
    """
    try:
        with np.errstate(over="ignore"):
            return perplexity.measure(
                graph,
                weights,
                windows,
                reference=(reference_graph or graph, reference) if reference else None,
                threads=threads,
                report=report,
                kv_format=kv_formats[1],
                reference_kv_format=kv_formats[0],
            )
    except CheckpointError:
        return None


def asked(
    task: Task,
    graph: Graph,
    threads: int,
    trials: Trials,
    key: Json,
    weights: Callable[[], Weights],
    stage: str,
    report: Report,
    kv_format: KvFormat = "auto",
) -> npt.NDArray[np.bool_]:
    """Whether each question is answered right, bool [questions]; from `trials` where it was asked before."""

    def ask() -> Json:
        progress = lambda _, done, total: report(f"{stage}, {task.path.name}", done, total)  # noqa: E731
        return task.right(graph, weights(), threads, progress, kv_format).astype(int).tolist()

    return np.array(trials.measure("task", [key, task.digest()], ask), bool)


def check_task(budget: Budget, task: Task, right: npt.NDArray[np.bool_]) -> str | None:
    """What is doubtful in the original's answers. Raises BudgetError where they leave nothing to lose."""
    if not right.any():
        raise BudgetError(
            f"the budget '{budget}' says nothing: the original answers none of {len(right)} questions right",
            "give a task that the model can do",
        )
    share, chance = float(right.mean()), task.chance()
    if chance and share < chance + LIKELY * math.sqrt(chance * (1 - chance) / len(right)):
        return f"the original's {share:.0%} on {task.path} are what guessing gets: a loss there says little"
    return None


@dataclass(frozen=True)
class Judge:
    """Measures candidates on one sample, beside the original. The original is scored once."""

    graph: Graph
    original: Weights
    sample: Sample
    budgets: Budgets
    threads: int
    trials: Trials
    key: Json
    report: Report
    model_key: Json = None
    """What measurements of the original alone depend on."""
    original_graph: Graph | None = None
    """Where the candidates have another."""
    kv_formats: KvFormats = AUTO

    def read(self, name: str, facts: Json, weights: Callable[[], Weights]) -> Readings:
        """The readings of the candidate that `weights()` makes; `facts` say which it is."""
        found = {}
        measures = sorted({b.measure for b in self.budgets.on_text})
        if measures:
            text = self.trials.measure(
                "quality", [self.key, measures, facts], lambda: self._on_text(name, measures, weights())
            )
            found = {measure: Reading(**text[measure]) for measure in measures}
        asked = {b.file: self._on_task(name, b, facts, weights) for b in self.budgets.tasks}
        return tuple(asked[b.file] if b.measure == "task" else found[b.measure] for b in self.budgets.parts)

    @cached_property
    def _original_logprobs(self) -> list[Float32]:
        found = self._score("scoring the original", self.original, None, self.original_graph, self.kv_formats[0])
        if found is None:
            raise CheckpointError("the model's log-probabilities are not finite", "its weights may be damaged")
        return found.logprobs

    def _on_text(self, name: str, measures: Sequence[str], weights: Weights) -> Mapping[str, Json]:
        alone = measures == ["ppl"]
        original = self._original_logprobs if alone else []
        found = self._score(f"scoring {name}", weights, None if alone else self.original)
        if found is None:
            return {m: asdict(broken(self.sample.tokens)) for m in measures}
        if alone:
            return {"ppl": asdict(ratio_reading(original, found.logprobs))}
        return {b.measure: asdict(reading(b, found)) for b in self.budgets.on_text}

    def _on_task(self, name: str, budget: Budget, facts: Json, weights: Callable[[], Weights]) -> Reading:
        assert budget.file is not None
        task, common = self.sample.tasks[budget.file], (self.threads, self.trials)
        key, first = [self.model_key, "original"], self.original_graph or self.graph
        kv, own_kv = self.kv_formats
        original = asked(task, first, *common, key, lambda: self.original, "asking the original", self.report, kv)
        own = asked(task, self.graph, *common, [self.key, facts], weights, f"asking {name}", self.report, own_kv)
        return task_reading(original, own)

    def _score(
        self,
        stage: str,
        weights: Weights,
        reference: Weights | None,
        graph: Graph | None = None,
        kv_format: KvFormat | None = None,
    ) -> Evaluation | None:
        report = lambda _, done, total: self.report(stage, done, total)  # noqa: E731
        own, windows = graph or self.graph, self.sample.windows
        pair = self.kv_formats[0], kv_format or self.kv_formats[1]
        return score(own, weights, windows, reference, self.threads, report, self.original_graph, pair)
