"""Whole blocks left out: those whose output is most like their input, or those whose absence is measured least.

Similarity is 1 - E[cos(input, output)] over tokens (block influence: ShortGPT, Men et al. 2024, arXiv:2403.03853,
equation 1). Measured is KL(model || model without the block) in nats a token, with the kernels that serve. After a
block has gone the others are measured again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.backends import feed, native
from hasten.backends.batch import Int32, Limits
from hasten.compress import calibrate
from hasten.compress.calibrate import Report, Weights
from hasten.compress.statistics import Hidden
from hasten.compress.structures import Change, Float64, Hessians, Read
from hasten.errors import InputError
from hasten.graph.graph import Graph
from hasten.graph.structure import Structure, restructured


def restructure(graph: Graph, read: Read, hessians: Hessians, amount: Sequence[int]) -> Change:
    """`amount`: the blocks that go. No weight changes."""
    return Structure(tuple(sorted(amount))), {}


def influences(graph: Graph, weights: Weights, windows: Sequence[Int32], limits: Limits) -> Float64:
    """[blocks] mean over tokens of 1 - cos(input, output)."""
    hidden = calibrate.embed(graph, weights, windows, limits)
    found = []
    for index in range(len(graph.blocks)):
        after = calibrate.run(graph.block(index), weights, windows, hidden, limits)
        found.append(influence(hidden, after))
        hidden = after
    return np.array(found)


def influence(before: Hidden, after: Hidden) -> float:
    """Mean over tokens of 1 - cos(before, after); each holds an array [tokens, width] a window."""
    total, tokens = 0.0, 0
    for x, y in zip(before, after, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosines = np.divide(np.einsum("tw,tw->t", x, y), norms, out=np.zeros(len(x)), where=norms > 0)
        total, tokens = total + float(np.sum(1 - cosines)), tokens + len(x)
    return total / tokens


def losses(graph: Graph, weights: Weights, windows: Sequence[Int32], limits: Limits, final: Hidden) -> Float64:
    """[blocks] KL(original || `graph` without the block) in nats a token, infinite where the output is not a number.

    `final`: the original's hidden states behind its last block, over the same windows. A block that is left out hands
    its input on, so only what follows it runs.
    """
    reference = native.compile(graph.tail(len(graph.blocks)), weights, limits, tune=True)
    hidden = calibrate.embed(graph, weights, windows, limits)
    sums = np.zeros(len(graph.blocks))
    for index in range(len(graph.blocks)):
        program = native.compile(graph.tail(index + 1), weights, limits, tune=True)
        for window, start, batch in feed.windows(windows, limits):
            stop = start + len(batch.tokens)
            batch.hidden = np.ascontiguousarray(final[window][start:stop])
            expected = reference.step(batch)
            batch.hidden = np.ascontiguousarray(hidden[window][start:stop])
            sums[index] += program.step(batch).divergence(expected).sum()
        hidden = calibrate.run(graph.block(index), weights, windows, hidden, limits)
    return np.where(np.isfinite(sums), np.maximum(sums, 0.0), np.inf) / sum(len(w) for w in windows)


def choose(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    count: int,
    by: str,
    *,
    kv_format: str,
    threads: int = 0,
    report: Report | None = None,
) -> list[int]:
    """The `count` blocks to leave out, ascending, `by` "similarity" or "loss", one after another.

    Raises InputError where too many are asked for.
    """
    if not 1 <= count < len(graph.blocks):
        raise InputError(f"{count} blocks cannot be dropped, the model has {len(graph.blocks)} and must keep one")
    limits = calibrate.limits_for(windows, kv_format, threads)
    final = calibrate.embed(graph, weights, windows, limits)
    for index in range(len(graph.blocks)):
        final = calibrate.run(graph.block(index), weights, windows, final, limits)
    gone: list[int] = []
    for done in range(count):
        if report:
            report("measuring blocks", done, count)
        structure = Structure(tuple(sorted(gone)))
        left, numbers = restructured(graph, structure), structure.kept(len(graph.blocks))
        if by == "loss":
            scores = losses(left, weights, windows, limits, final)
        else:
            scores = influences(left, weights, windows, limits)
        gone.append(numbers[int(np.argmin(scores))])
    if report:
        report("measuring blocks", count, count)
    return sorted(gone)
