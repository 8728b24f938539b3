"""Prints a graph, a line a node: what `hasten inspect --graph` shows before and after fusion."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields

from hasten.graph.graph import TOKENS, Graph
from hasten.graph.ops import Op


def describe(graph: Graph, whole: bool = False) -> str:
    """Op and name, inputs, weights with shapes, outputs with widths; then the fuser's notes.

    Neighbouring blocks that differ in nothing but their number are shown once, unless `whole`.
    """
    widths = graph.widths()
    lines = list(_nodes(graph, widths, 0, graph.blocks[0].start if graph.blocks else len(graph.nodes)))
    index = 0
    while index < len(graph.blocks):
        last = index
        while not whole and last + 1 < len(graph.blocks) and _alike(graph, index, last + 1):
            last += 1
        block = graph.blocks[index]
        title = f"block {index}" if last == index else f"blocks {index} to {last}, alike"
        lines += [f"-- {title}", *_nodes(graph, widths, block.start, block.stop)]
        index = last + 1
    if graph.blocks:
        lines += ["-- after the blocks", *_nodes(graph, widths, graph.blocks[-1].stop, len(graph.nodes))]
    if graph.notes:
        lines += ["-- notes", *(graph.notes if whole else _counted(graph.notes))]
    return "\n".join(lines)


def _nodes(graph: Graph, widths: dict[str, int], start: int, stop: int) -> Iterator[str]:
    for node in graph.nodes[start:stop]:
        inputs = ", ".join(v if v == TOKENS else f"{v} [{widths[v]}]" for v in node.inputs) or "hidden states"
        outputs = ", ".join(f"{v} [{widths[v]}]" for v in node.outputs)
        weights = ", ".join(f"{w} {list(graph.weights[w].shape)}" for w in node.weights)
        yield f"{attributes(node.op)} {node.name}: {inputs} -> {outputs}" + (f"; weights {weights}" if weights else "")


def attributes(op: Op) -> str:
    """Name(attribute=value, ...), those at their default left out; a list of frequencies by its length."""
    shown = []
    for field in fields(op):
        value = getattr(op, field.name)
        if value is None or value == field.default:
            continue
        if field.name == "frequencies":
            value = f"<{len(value)}>"
        shown.append(f"{field.name}={attributes(value) if isinstance(value, Op) else value}")
    return f"{type(op).__name__}({', '.join(shown)})" if shown else type(op).__name__


def _alike(graph: Graph, first: int, second: int) -> bool:
    return _anonymous(graph, first) == _anonymous(graph, second)


def _anonymous(graph: Graph, index: int) -> list[str]:
    """The block's nodes without the numbers that say which block it is."""
    block = graph.blocks[index]
    here = {v for n in graph.nodes[block.start : block.stop] for v in n.outputs}
    lines = []
    for node in graph.nodes[block.start : block.stop]:
        inputs = [_without_number(v) if v in here else "input" for v in node.inputs]
        op = re.sub(r"layer=\d+", "layer", repr(node.op))
        shapes = [graph.weights[w].shape for w in node.weights]
        lines.append(f"{op} {_without_number(node.name)} {inputs} {shapes}")
    return lines


def _without_number(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def _counted(notes: Iterable[str]) -> list[str]:
    """Notes that differ in nothing but numbers of blocks, once, with how often."""
    counts: dict[str, int] = {}
    for note in notes:
        shape = _without_number(note)
        counts[shape] = counts.get(shape, 0) + 1
    return [f"{note} ({count} times)" if count > 1 else note for note, count in counts.items()]
