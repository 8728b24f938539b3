"""What a matrix costs in each format: time with the real kernels at the objective's shapes, or bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hasten import formats
from hasten.backends import feed, native
from hasten.backends.batch import Batch, Limits
from hasten.bench import machine
from hasten.compress.recipe import Choice
from hasten.formats import Weight
from hasten.graph.graph import Graph, GraphBuilder
from hasten.graph.ops import Input, Linear
from hasten.search.candidates import Tensor, nbytes
from hasten.search.objective import Objective, Phase
from hasten.search.trials import Json, Trials

Report = Callable[[str, int, int], None]
SECONDS = 0.05
MOST_COPIES = 256


Costs = Sequence[Sequence[float]]
"""Of each matrix's choices."""


@dataclass(frozen=True)
class Site:
    """One thing to time: a matrix of `shape` in `format`, at `tokens` tokens."""

    shape: tuple[int, int]
    format: str
    tokens: int


@dataclass(frozen=True)
class Whole:
    """`seconds`: of the objective's phases with the original.

    `scale`: by format, what a matrix takes in the model for a second alone; `own`: the same where it stays as it was.
    """

    seconds: float
    scale: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)

    def factors(self, tensor: Tensor) -> list[float]:
        """Of each of the tensor's choices."""
        first, *others = names_of(tensor)
        return [self.own.get(first, 1.0), *(self.scale.get(name, 1.0) for name in others)]

    def scaled(self, tensors: Sequence[Tensor], alone: Costs) -> list[list[float]]:
        """What each choice of each matrix takes in the model."""
        return [
            [cost * factor for factor, cost in zip(self.factors(t), row, strict=True)]
            for t, row in zip(tensors, alone, strict=True)
        ]


def names_of(tensor: Tensor) -> list[str]:
    """The format of each choice."""
    return [tensor.format, *(c.format for c in tensor.choices[1:])]


def sites(tensors: Sequence[Tensor], objective: Objective) -> dict[Site, int]:
    """What must be timed, and how many matrices of the model each stands for."""
    found: dict[Site, int] = {}
    for tensor in tensors:
        for choice in tensor.choices:
            for phase in objective.phases if tensor.linears else ():
                site = site_of(tensor, choice, phase)
                found[site] = found.get(site, 0) + 1
    return found


def site_of(tensor: Tensor, choice: Choice, phase: Phase) -> Site:
    """The head is multiplied for a prompt's last token only."""
    name = tensor.format if choice.is_original else choice.format
    return Site(tensor.shape, name, phase.rows if tensor.at_rows else phase.tokens)


def measure(
    tensors: Sequence[Tensor], objective: Objective, threads: int, trials: Trials, key: Json, report: Report
) -> dict[Site, float]:
    """Seconds for one multiplication at every site."""
    wanted = sites(tensors, objective)
    cache = machine.last_level_cache()
    found = {}
    for done, site in enumerate(wanted):
        report("timing kernels", done, len(wanted))
        # Between two steps the rest of the model passes through the caches, in formats of about this size.
        format = formats.get(site.format)
        between = min(sum(format.nbytes(*t.shape) for t in tensors if t.linears), 2 * cache)
        facts = [key, list(site.shape), site.format, site.tokens, threads, between]
        found[site] = float(trials.measure("cost", facts, partial(seconds, site, between, threads)))
    report("timing kernels", len(wanted), len(wanted))
    return found


def costs(tensor: Tensor, objective: Objective, times: dict[Site, float]) -> list[float]:
    """The cost of each of the tensor's choices: seconds of the objective's steps together, or bytes."""
    if objective.name == "memory":
        return [float(nbytes(tensor, c)) for c in tensor.choices]
    return [
        tensor.linears * sum(phase.count * times[site_of(tensor, c, phase)] for phase in objective.phases)
        if tensor.linears
        else 0.0
        for c in tensor.choices
    ]


def seconds(site: Site, between: int, threads: int = 0) -> float:
    """Time of one multiplication, among many with weights of their own, `between` bytes of them together.

    The time of a step with one alone is taken off, so what a step costs beyond its matrices is no part.
    """
    each = formats.get(site.format).nbytes(*site.shape)
    copies = min(MOST_COPIES, max(between // each + 1, 8 if site.tokens == 1 else 3))
    batch = _batch(site)
    times = {count: _time(_program(site, count, threads), batch) for count in (1, copies)}
    slope = (times[copies] - times[1]) / (copies - 1)
    return slope if slope > 0 else times[copies] / copies


def _program(site: Site, copies: int, threads: int) -> native.NativeProgram:
    rows, columns = site.shape
    builder = GraphBuilder(context=max(site.tokens, 32), vocabulary=rows, hidden=columns)
    names = [builder.weight(f"w{i}", rows, columns) for i in range(copies)]
    builder.add(Input(columns), "x")
    for name in names:
        builder.add(Linear(), f"y.{name}", "x", weights=(name,))
    graph: Graph = builder.finish(f"y.{names[-1]}")
    format = formats.get(site.format)
    one = format.random(rows, columns, 0)
    weights = {name: Weight(format, one.shape, {k: a.copy() for k, a in one.arrays.items()}) for name in names}
    limits: Limits = feed.window_limits(max(site.tokens, 32), max(site.tokens, 1), threads=threads)
    return native.compile(graph, weights, limits, tune=True)


def _batch(site: Site) -> Batch:
    tokens = np.zeros(site.tokens, np.int32)
    limits = feed.window_limits(max(site.tokens, 32), site.tokens)
    ((_, _, batch),) = feed.windows([tokens], limits)
    batch.hidden = np.random.default_rng(0).normal(size=(site.tokens, site.shape[1])).astype(np.float32)
    return batch


def _time(program: native.NativeProgram, batch: Batch) -> float:
    """The median of the faster half of steps: what disturbs a step only ever adds to it."""
    program.settle(lambda: program.step(batch))
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 500):
        start = time.perf_counter()
        program.step(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[: (len(times) + 1) // 2])
