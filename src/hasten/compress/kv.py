"""Which layers' keys and values may be kept in fewer bits: what each format costs in each layer alone, and a choice.

The loss is KL(cache as it is || with one layer's in another format) on calibration text, teacher-forced, over the whole
vocabulary, with the kernels that serve. Hidden states are kept at the block at hand, so only the rest of the model
runs. Losses of several layers add up roughly; whoever chooses measures what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hasten.backends import cache, feed, native
from hasten.backends.batch import Int32, Limits, Program
from hasten.backends.cache import KvFormat
from hasten.compress import calibrate
from hasten.compress.calibrate import Report, Weights
from hasten.compress.statistics import Hidden
from hasten.errors import BudgetError
from hasten.graph.graph import Graph

Losses = Mapping[tuple[int, str], float]
"""(layer's cache slot, format) -> nats a token."""
FORMATS = ("int8", "int4")


def measure(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    *,
    kv_format: KvFormat = "bf16",
    formats: Sequence[str] = FORMATS,
    final: Hidden | None = None,
    threads: int = 0,
    report: Report | None = None,
) -> dict[tuple[int, str], float]:
    """The loss of each of `formats` in each layer, all others in `kv_format`; infinite where the output is broken.

    `windows`: token ids [tokens] each. `final`: the last block's output for them, where `calibrate` has it already for
    the same weights and cache. Raises what compiling a graph raises.
    """
    limits = calibrate.limits_for(windows, kv_format, threads)
    plain = cache.formats_of(graph, kv_format)
    depth = len(graph.blocks)
    if final is None:
        final = calibrate.embed(graph, weights, windows, limits)
        for block in range(depth):
            final = calibrate.run(graph.block(block), weights, windows, final, limits)
    reference = _compile(graph.tail(depth), weights, limits)
    hidden = calibrate.embed(graph, weights, windows, limits)
    found: dict[tuple[int, str], float] = {}
    for block in range(depth):
        if report:
            report("cache formats", block, depth)
        section, part = graph.tail(block), graph.block(block)
        tried = [(slot, name) for slot in part.slots or () for name in formats if name != plain[slot]]
        programs = [_compile(section, weights, limits, _changed(plain, slot, name)) for slot, name in tried]
        found |= dict(zip(tried, _divergences(programs, windows, hidden, reference, final, limits), strict=True))
        hidden = calibrate.run(part, weights, windows, hidden, limits)
    if report:
        report("cache formats", depth, depth)
    return found


def saved_bytes(graph: Graph, kv_format: KvFormat, layer: int, name: str) -> int:
    """Bytes of a token that `layer` takes less in format `name`."""
    op = next(op for op in cache.attentions(graph) if op.layer == layer)
    before = cache.token_bytes(cache.formats_of(graph, kv_format)[layer], op.head_dim)
    return 2 * op.kv_heads * (before - cache.token_bytes(name, op.head_dim))


def choose(graph: Graph, losses: Losses, budget: float, kv_format: KvFormat = "bf16") -> tuple[str, ...]:
    """The format of each layer that saves the most bytes a token while losses add up to `budget` at most.

    A multiple-choice knapsack, solved exactly: there are few distinct sums of bytes. Raises BudgetError for a budget
    below 0.
    """
    if not budget >= 0:
        raise BudgetError(f"a budget of {budget:g} nats: the cache as it is loses 0")
    plain = cache.formats_of(graph, kv_format)
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}  # bytes saved -> the least loss, and how
    for layer, own in enumerate(plain):
        options = [(0, 0.0, own)]
        options += [(saved_bytes(graph, plain, layer, n), loss, n) for (at, n), loss in losses.items() if at == layer]
        after: dict[int, tuple[float, tuple[str, ...]]] = {}
        for bytes_so_far, (lost, names) in best.items():
            for saved, loss, name in options:
                total, sum_of_losses = bytes_so_far + saved, lost + loss
                if sum_of_losses <= budget and (total not in after or sum_of_losses < after[total][0]):
                    after[total] = (sum_of_losses, (*names, name))
        best = after
    return best[max(best)][1]


def _changed(plain: tuple[str, ...], slot: int, name: str) -> tuple[str, ...]:
    return (*plain[:slot], name, *plain[slot + 1 :])


def _compile(graph: Graph, weights: Weights, limits: Limits, kv_format: KvFormat | None = None) -> Program:
    own = {name: weights[name] for name in graph.weights}
    return native.compile(graph, own, limits if kv_format is None else replace(limits, kv_format=kv_format), tune=True)


def _divergences(
    programs: Sequence[Program],
    windows: Sequence[Int32],
    hidden: Hidden,
    reference: Program,
    final: Hidden,
    limits: Limits,
) -> list[float]:
    """Mean KL(reference on `final` || each program on `hidden`), in lockstep, so that no logits are stored."""
    sums = np.zeros(len(programs))
    for index, start, batch in feed.windows(windows, limits):
        rows = slice(start, start + len(batch.tokens))
        batch.hidden = np.ascontiguousarray(final[index][rows])
        expected = reference.step(batch)
        batch.hidden = np.ascontiguousarray(hidden[index][rows])
        for i, program in enumerate(programs):
            sums[i] += program.step(batch).divergence(expected).sum()
    means = sums / sum(len(w) for w in windows)
    return [max(0.0, float(m)) if np.isfinite(m) else float("inf") for m in means]
