"""Statistics of what flows into each matrix, made block by block with the kernels that serve.

Hidden states of all calibration windows are held at one block's input at a time; a block is compiled, run over them,
and gives the next block's input. So memory is one block's buffers and one set of hidden states, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from hasten import formats
from hasten.backends import feed, native
from hasten.backends.batch import Float32, Int32, Limits, Outputs
from hasten.backends.cache import KvFormat
from hasten.compress.statistics import Gatherer, Hidden, Statistics
from hasten.errors import FormatError
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
        if index < len(graph.blocks):
            hidden = gather(graph.block(index), weights, windows, hidden, limits, statistics, hessians)
        else:
            look(graph.tail(index), weights, windows, hidden, limits, statistics, hessians)
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


def steps(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    hidden: Hidden | None,
    limits: Limits,
    keep: Sequence[str],
) -> Iterator[tuple[int, Outputs]]:
    """Each step's window and outputs, with the values in `keep` readable until the next."""
    own = {name: weights[name] for name in graph.weights}
    program = native.compile(graph, own, limits, keep=tuple(dict.fromkeys(keep)), tune=True)
    for index, start, batch in feed.windows(windows, limits):
        if hidden is not None:
            batch.hidden = np.ascontiguousarray(hidden[index][start : start + len(batch.tokens)])
        yield index, program.step(batch)


def run(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    hidden: Hidden | None,
    limits: Limits,
    visit: _Sites | None = None,
) -> Hidden:
    """The graph's output for every window; `visit` sees each step."""
    parts: list[list[Float32]] = [[] for _ in windows]
    for index, outputs in steps(graph, weights, windows, hidden, limits, [*(visit or ()), graph.output]):
        if visit:
            visit.add(outputs)
        parts[index].append(outputs.value(graph.output))
    return [np.concatenate(p) for p in parts]


def up_to_inputs(graph: Graph) -> Graph:
    """The graph without what follows the last value that a linear reads: a head's logits are no statistics, and cost as
    much as a block."""
    wanted = list(linear_inputs(graph))
    needed = set(wanted)
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            nodes.insert(0, node)
    used = dict.fromkeys(w for node in nodes for w in node.weights)
    return replace(graph, nodes=tuple(nodes), weights={name: graph.weights[name] for name in used}, output=wanted[-1])


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
) -> Hidden:
    """Add what flows into the linears of a section to `into`; returns the section's output."""
    seen = _Sites(section, hessians)
    after = run(section, weights, windows, hidden, limits, seen)
    seen.tell(into)
    return after


def look(
    section: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    hidden: Hidden,
    limits: Limits,
    into: Statistics,
    hessians: Collection[str] = (),
) -> None:
    """`gather` where the section's output is not wanted: nothing after the last linear's input is computed."""
    seen, through = _Sites(section, hessians), up_to_inputs(section)
    for _, outputs in steps(through, weights, windows, hidden, limits, [*seen]):
        seen.add(outputs)
    seen.tell(into)


def roughly(section: Graph, weights: Weights, names: Collection[str]) -> Weights:
    """The section's weights for `look`, with the matrices `names` in int4 by nearest rounding.

    Where they are to have about four bits, those that read what they give then see about what they will see; and int4
    is 2.5 times as fast as bf16.
    """
    found = {n: weights[n] for n in up_to_inputs(section).weights}
    for name in found.keys() & set(names):
        weight = found[name]
        if isinstance(weight, Weight) and not weight.format.group:
            with suppress(FormatError):  # what cannot be rounded is refused, by name, when it is packed
                found[name] = formats.get("int4-g32").pack(weight.dense())
    return found


class _Sites:
    """What flows into the linears of a section."""

    def __init__(self, section: Graph, hessians: Collection[str]) -> None:
        self.readers = linear_inputs(section)
        wanted = frozenset(value for value, names in self.readers.items() if any(n in hessians for n in names))
        self._gatherer = Gatherer(self.readers, wanted)

    def __iter__(self) -> Iterator[str]:
        """The values that are to be readable at each step."""
        return iter(self.readers)

    def add(self, outputs: Outputs) -> None:
        for value in self.readers:
            self._gatherer.add(value, outputs.value(value))

    def tell(self, into: Statistics) -> None:
        into.sites |= self._gatherer.found()
        into.readers |= {name: value for value, names in self.readers.items() for name in names}
