"""Statistics of what flows into each matrix, made block by block with the kernels that serve.

Hidden states of all calibration windows are held at one block's input at a time; a block is compiled, run over them,
and gives the next block's input. So memory is one block's buffers and one set of hidden states, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.backends import feed, native
from hasten.backends.batch import Float32, Int32, Limits, Outputs
from hasten.backends.cache import KvFormat
from hasten.errors import OutputError
from hasten.formats import Weight
from hasten.graph.graph import Graph
from hasten.graph.ops import Linear

Weights = Mapping[str, Weight | Float32]
Report = Callable[[str, int, int], None]
Hidden = list[Float32]
"""One array [tokens, width] a window."""

CHUNK = 256


@dataclass
class Statistics:
    """`moments`: weight name -> mean square of each of its input features [in]; `final`: the last block's output."""

    moments: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    tokens: int = 0
    final: Hidden = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Into one .npz file, complete or not at all. Raises OutputError."""
        arrays: dict[str, Any] = {f"moments/{name}": m for name, m in self.moments.items()}
        arrays |= {f"final/{i:06d}": f for i, f in enumerate(self.final)}
        arrays["tokens"] = np.array(self.tokens)
        part = file.with_suffix(".part")
        try:
            with part.open("wb") as stream:
                np.savez(stream, **arrays)
            part.replace(file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {file}: {error.strerror}", "is the disk full?") from None

    @staticmethod
    def load(file: Path) -> Statistics:
        with np.load(file) as arrays:
            moments = {n.removeprefix("moments/"): arrays[n] for n in arrays.files if n.startswith("moments/")}
            final = [arrays[n] for n in sorted(arrays.files) if n.startswith("final/")]
            return Statistics(moments, int(arrays["tokens"]), final)


def calibrate(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    *,
    kv_format: KvFormat,
    threads: int = 0,
    report: Report | None = None,
) -> Statistics:
    """Run `windows` of token ids through the model and gather each linear's input statistics.

    `kv_format`: of the cache that the model is served with.
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
        section = graph.block(index) if index < len(graph.blocks) else graph.tail(index)
        hidden = _gather(section, weights, windows, hidden, limits, statistics)
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
    program = native.compile(graph, own, limits, keep=tuple(dict.fromkeys([*keep, graph.output])))
    parts: list[list[Float32]] = [[] for _ in windows]
    for index, start, batch in feed.windows(windows, limits):
        if hidden is not None:
            batch.hidden = np.ascontiguousarray(hidden[index][start : start + len(batch.tokens)])
        outputs = program.step(batch)
        if visit:
            visit(outputs)
        parts[index].append(outputs.value(graph.output))
    return [np.concatenate(p) for p in parts]


def linear_inputs(graph: Graph) -> dict[str, list[str]]:
    """Value -> weights of the linears that read it."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Linear):
            found.setdefault(node.inputs[0], []).append(node.weights[0])
    return found


def _gather(
    section: Graph, weights: Weights, windows: Sequence[Int32], hidden: Hidden, limits: Limits, into: Statistics
) -> Hidden:
    sites = linear_inputs(section)
    sums: dict[str, npt.NDArray[np.float64]] = {}

    def add(outputs: Outputs) -> None:
        for value in sites:
            x = outputs.value(value)  # [tokens, in]
            square = np.einsum("ti,ti->i", x, x, dtype=np.float64)
            sums[value] = sums.get(value, 0.0) + square

    after = run(section, weights, windows, hidden, limits, tuple(sites), add)
    for value, names in sites.items():
        for name in names:
            into.moments[name] = sums[value] / into.tokens
    return after
