"""Statistics of what flows into each matrix, made block by block with the kernels that serve.

Hidden states of all calibration windows are held at one block's input at a time; a block is compiled, run over them,
and gives the next block's input. So memory is one block's buffers and one set of hidden states, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hasten.backends import feed, native
from hasten.backends.batch import Float32, Int32, Limits, Outputs
from hasten.backends.cache import KvFormat
from hasten.compress.statistics import Gatherer, Hidden, Statistics
from hasten.formats import Weight
from hasten.graph.graph import Graph, Node
from hasten.graph.ops import Linear

Weights = Mapping[str, Weight | Float32]
Report = Callable[[str, int, int], None]

CHUNK = 256


def calibrate(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    *,
    kv_format: KvFormat,
    hessians: Collection[str] = (),
    done: Callable[[Statistics], None] | None = None,
    threads: int = 0,
    report: Report | None = None,
) -> Statistics:
    """Run `windows` of token ids through the model and gather each linear's input statistics.

    `kv_format`: of the cache that the model is served with. `hessians`: weights whose inputs' second
    moments are wanted. `done` sees the statistics after each block, and may put elsewhere what is large.
    """
    limits = limits_for(windows, kv_format, threads)
    statistics = Statistics(tokens=sum(len(w) for w in windows))
    hidden = embed(graph, weights, windows, limits)
    total = len(graph.blocks) + 1
    for index in range(total):
        if report:
            report("calibration", index, total)
        if index == total - 1:
            statistics.final = hidden
        section = graph.block(index) if index < len(graph.blocks) else head_input(graph)
        readers = linear_inputs(graph.tail(index)) if index == len(graph.blocks) else None
        hidden = gather(section, weights, windows, hidden, limits, statistics, hessians, readers)
        if done:
            done(statistics)
    if report:
        report("calibration", total, total)
    return statistics


def limits_for(windows: Sequence[Int32], kv_format: KvFormat, threads: int = 0, chunk: int = CHUNK) -> Limits:
    return feed.window_limits(max(len(w) for w in windows), chunk, kv_format=kv_format, threads=threads)


def embed(graph: Graph, weights: Weights, windows: Sequence[Int32], limits: Limits) -> Hidden:
    """Hidden states at the first block's input."""
    nodes = graph.nodes[: graph.blocks[0].start]
    names = dict.fromkeys(w for n in nodes for w in n.weights)
    entry = graph.blocks[0].input
    front = replace(graph, nodes=nodes, weights={w: graph.weights[w] for w in names}, output=entry, blocks=())
    return run(front, weights, windows, None, limits)


def run(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    hidden: Hidden | None,
    limits: Limits,
    keep: Sequence[str] = (),
    visit: Callable[[Outputs], None] | None = None,
) -> Hidden:
    """The graph's output for every window; `visit` sees each step's outputs, with the values in `keep` readable."""
    own = {name: weights[name] for name in graph.weights}
    program = native.compile(graph, own, limits, keep=tuple(dict.fromkeys([*keep, graph.output])), tune=True)
    parts: list[list[Float32]] = [[] for _ in windows]
    for index, start, batch in feed.windows(windows, limits):
        if hidden is not None:
            batch.hidden = np.ascontiguousarray(hidden[index][start : start + len(batch.tokens)])
        outputs = program.step(batch)
        if visit:
            visit(outputs)
        parts[index].append(outputs.value(graph.output))
    return [np.concatenate(p) for p in parts]


def head_input(graph: Graph) -> Graph:
    """What follows the last block, up to what the head's last linear reads: logits are no statistics, and cost as much
    as a block."""
    tail = graph.tail(len(graph.blocks))
    output = next(node.inputs[0] for node in reversed(tail.nodes) if isinstance(node.op, Linear))
    needed = {output}
    nodes: list[Node] = []
    for node in reversed(tail.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            nodes.insert(0, node)
    used = dict.fromkeys(w for node in nodes for w in node.weights)
    return replace(tail, nodes=tuple(nodes), weights={name: tail.weights[name] for name in used}, output=output)


def linear_inputs(graph: Graph) -> dict[str, list[str]]:
    """Value -> weights of the linears that read it."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Linear):
            found.setdefault(node.inputs[0], []).append(node.weights[0])
    return found


def gather(
    section: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    hidden: Hidden,
    limits: Limits,
    into: Statistics,
    hessians: Collection[str] = (),
    readers: Mapping[str, list[str]] | None = None,
) -> Hidden:
    """Add what flows into the linears of a section to `into`; returns the section's output.

    `readers`: value -> weights of the linears that read it, where these are no part of the section.
    """
    known = {value for node in section.nodes for value in node.outputs}
    found = linear_inputs(section) if readers is None else readers
    sites = {value: names for value, names in found.items() if value in known}
    wanted = frozenset(value for value, names in sites.items() if any(n in hessians for n in names))
    gatherer = Gatherer(sites, wanted)

    def add(outputs: Outputs) -> None:
        for value in sites:
            gatherer.add(value, outputs.value(value))

    after = run(section, weights, windows, hidden, limits, tuple(sites), add)
    into.sites |= gatherer.found()
    into.readers |= {name: value for value, names in sites.items() for name in names}
    return after
