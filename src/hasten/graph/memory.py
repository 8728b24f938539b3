"""Plans where values live: one arena, in which values that are never alive together share memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hasten.graph.graph import TOKENS, Graph

ROW_ALIGNMENT = 16
"""Floats: every row of a value starts on 64 bytes."""
CONTENDED = 512
"""Floats: rows a multiple of 2 KiB apart contend for a few sets of the first-level cache, so strides avoid it."""


@dataclass(frozen=True)
class Buffer:
    """A value of up to `rows` rows, row r at offset + r * stride floats.

    Alive from node `born` to node `dies`, both included.
    """

    offset: int
    rows: int
    stride: int
    born: int
    dies: int

    @property
    def size(self) -> int:
        return self.rows * self.stride

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class BufferPlan:
    """Offsets and `total` in floats."""

    buffers: dict[str, Buffer]
    total: int

    @property
    def offsets(self) -> dict[str, int]:
        return {value: buffer.offset for value, buffer in self.buffers.items()}


def plan(graph: Graph, max_tokens: int, max_rows: int, keep: Iterable[str] = ()) -> BufferPlan:
    """Place every value of `graph`; those in `keep`, and the graph's output, stay readable to the end.

    Greedy by size, each at the lowest offset that is free all its life (Pisarchyk and Lee 2020, "Efficient Memory
    Management for Deep Neural Net Inference", algorithm 3). A node's inputs and outputs never overlap.
    """
    wanted = _lifetimes(graph, max_tokens, max_rows, frozenset(keep) | {graph.output})
    placed: dict[str, Buffer] = {}
    for value, buffer in sorted(wanted.items(), key=lambda item: (-item[1].size, item[1].born)):
        offset = 0
        neighbours = (b for b in placed.values() if b.born <= buffer.dies and buffer.born <= b.dies)
        for other in sorted(neighbours, key=lambda b: b.offset):
            if other.offset - offset >= buffer.size:
                break
            offset = max(offset, other.end)
        placed[value] = Buffer(offset, buffer.rows, buffer.stride, buffer.born, buffer.dies)
    return BufferPlan({value: placed[value] for value in wanted}, max((b.end for b in placed.values()), default=0))


def _lifetimes(graph: Graph, max_tokens: int, max_rows: int, keep: frozenset[str]) -> dict[str, Buffer]:
    """Every value's buffer, not placed yet."""
    widths, selected = graph.widths(), graph.row_values()
    last = len(graph.nodes) - 1
    dies = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs if value != TOKENS}
    buffers = {}
    for born, node in enumerate(graph.nodes):
        for value in node.outputs:
            stride = -(-widths[value] // ROW_ALIGNMENT) * ROW_ALIGNMENT
            if stride % CONTENDED == 0:
                stride += ROW_ALIGNMENT
            rows = max_rows if value in selected else max_tokens
            buffers[value] = Buffer(0, rows, stride, born, last if value in keep else dies.get(value, born))
    return buffers
