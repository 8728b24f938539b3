"""Fusion: fewer, larger nodes that compute the same values, so that each input is read, normed and quantised once.

A value disappears only if exactly one node reads it and nobody asked to keep it; block inputs and outputs always stay.
Every decision is noted, also those against (`hasten inspect --graph` prints them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from hasten.graph.graph import Block, Graph, Node
from hasten.graph.ops import (
    Add,
    Attention,
    FusedAttention,
    FusedLinear,
    FusedNorm,
    Gate,
    Linear,
    Norm,
    Op,
    Rope,
)


def fuse(graph: Graph, keep: Iterable[str] = ()) -> Graph:
    """The same graph in fewer nodes. `keep` names values that must stay readable."""
    boundaries = [v for block in graph.blocks for v in (block.input, block.output)]
    protected = frozenset([graph.output, *boundaries, *keep])
    block_of = {n.outputs[0]: i for i, b in enumerate(graph.blocks) for n in graph.nodes[b.start : b.stop]}
    nodes, notes = graph.nodes, list(graph.notes)
    for rewrite in PASSES:
        sweep = Sweep(nodes, protected, block_of)
        rewrite(sweep)
        nodes = sweep.result()
        notes += sweep.notes
    return replace(graph, nodes=nodes, blocks=_find_blocks(graph, nodes, block_of), notes=tuple(notes))


def _find_blocks(graph: Graph, nodes: tuple[Node, ...], block_of: dict[str, int]) -> tuple[Block, ...]:
    """Where each block's nodes stand now: a fused node's outputs were outputs of the block before."""
    blocks = []
    for index, block in enumerate(graph.blocks):
        places = [place for place, node in enumerate(nodes) if block_of.get(node.outputs[0]) == index]
        assert places == list(range(places[0], places[-1] + 1)), f"block {index} was torn apart"
        blocks.append(replace(block, start=places[0], stop=places[-1] + 1))
    return tuple(blocks)


@dataclass
class Sweep:
    """One pass over the nodes. Merges are collected and applied together; a node takes part in one of them."""

    nodes: tuple[Node, ...]
    protected: frozenset[str]
    block_of: dict[str, int]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.producer = {value: node for node in self.nodes for value in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)
        self._merged: dict[str, Node | None] = {}

    def obstacle(self, value: str) -> str | None:
        """Why `value` cannot disappear into the one node that reads it; None where it can."""
        count = len(self.readers.get(value, ()))
        if value in self.protected:
            return f"{value} must stay readable"
        return None if count == 1 else f"{count} nodes read {value}"

    def source(self, value: str, kind: type[Op]) -> Node | None:
        """The `kind` that makes `value`, if it is there to be merged with the value's only reader."""
        node = self.producer.get(value)
        fits = node is not None and isinstance(node.op, kind) and node.outputs[0] not in self._merged
        return node if fits and self.obstacle(value) is None else None

    def merge(self, at: Node, parts: Iterable[Node], new: Node, note: str) -> None:
        """Put `new` in place of `at` and drop the other `parts`."""
        for part in parts:
            self._merged[part.outputs[0]] = None
        self._merged[at.outputs[0]] = new
        self.notes.append(f"{type(new.op).__name__} {new.name}: {note}")

    def refuse(self, node: Node, reason: str) -> None:
        self.notes.append(f"{type(node.op).__name__} {node.name} stands alone: {reason}")

    def result(self) -> tuple[Node, ...]:
        placed = (self._merged.get(node.outputs[0], node) for node in self.nodes)
        return tuple(node for node in placed if node is not None)


def fuse_attention(sweep: Sweep) -> None:
    """Rope and per-head norms of q and k into attention: one pass over a head writes the cache."""
    for node in sweep.nodes:
        if not isinstance(node.op, Attention):
            continue
        attention, values = node.op, list(node.inputs)
        ropes = [sweep.source(value, Rope) for value in values[:2]]
        rope = _shared_rope(attention, *ropes)
        gone = [r for r in ropes if r] if rope else []
        values[:2] = [r.inputs[0] for r in gone] or values[:2]
        norms: list[Node | None] = []
        for index, heads in enumerate((attention.heads, attention.kv_heads)):
            norm = sweep.source(values[index], Norm)
            if norm and isinstance(norm.op, Norm) and norm.op.heads != heads:
                sweep.refuse(norm, f"it norms {norm.op.heads} parts, not {heads} heads")
                norm = None
            norms.append(norm)
            if norm:
                values[index] = norm.inputs[0]
                gone.append(norm)
        if not gone:
            sweep.refuse(node, "no rope or per-head norm of both q and k leads to it alone")
            continue
        q_norm, k_norm = (n.op if n and isinstance(n.op, Norm) else None for n in norms)
        weights = tuple(w for n in norms if n for w in n.weights)
        new = Node(FusedAttention(attention, q_norm, k_norm, rope), node.name, tuple(values), node.outputs, weights)
        sweep.merge(node, gone, new, f"{_names(gone)} on the way into the cache")


def _shared_rope(attention: Attention, q: Node | None, k: Node | None) -> Rope | None:
    """The queries' rope where the keys' is the same but for the number of heads."""
    if q is None or k is None or not isinstance(q.op, Rope) or not isinstance(k.op, Rope):
        return None
    fits = q.op.heads == attention.heads and replace(q.op, heads=attention.kv_heads) == k.op
    return q.op if fits and q.op.head_dim == attention.head_dim else None


def fuse_gates(sweep: Sweep) -> None:
    """Gate and up projections of one input, and activation(gate) * up, into one linear with one output."""
    for node in sweep.nodes:
        if not isinstance(node.op, Gate):
            continue
        parts = [p for p in (sweep.source(value, Linear) for value in node.inputs) if p]
        if len(parts) != 2 or parts[0].inputs != parts[1].inputs:
            sweep.refuse(node, "its inputs are not two linears of one value, read by it alone")
            continue
        op = FusedLinear(None, _biases(parts), gate=node.op.kind)
        new = Node(op, parts[0].name, parts[0].inputs, node.outputs, parts[0].weights + parts[1].weights)
        sweep.merge(node, parts, new, f"{_names(parts)} and {node.op.kind} gate in one")


def group_linears(sweep: Sweep) -> None:
    """Linears of one input (q, k and v): it is quantised once."""
    for value, readers in sweep.readers.items():
        groups: dict[int | None, list[Node]] = {}
        for reader in readers:
            if isinstance(reader.op, Linear):
                groups.setdefault(sweep.block_of.get(reader.outputs[0]), []).append(reader)
        for parts in groups.values():
            if len(parts) > 1:
                weights = tuple(w for p in parts for w in p.weights)
                outputs = tuple(p.outputs[0] for p in parts)
                new = Node(FusedLinear(None, _biases(parts)), parts[0].name, (value,), outputs, weights)
                sweep.merge(parts[0], parts[1:], new, f"{_names(parts)} read {value}")


def fuse_residuals(sweep: Sweep) -> None:
    """A linear and the add that follows it: the sum is made while the output is in cache."""
    for node in sweep.nodes:
        if not isinstance(node.op, Add):
            continue
        for index in (1, 0):
            linear = sweep.source(node.inputs[index], Linear)
            if linear:
                op = FusedLinear(None, _biases([linear]), residual=True)
                inputs = (*linear.inputs, node.inputs[1 - index])
                new = Node(op, linear.name, inputs, node.outputs, linear.weights)
                sweep.merge(node, [linear], new, f"{linear.name} adds to {node.inputs[1 - index]}")
                break


def fuse_norms(sweep: Sweep) -> None:
    """A norm into the one linear (or group) that reads it: norm and quantisation are one pass over the input."""
    for node in sweep.nodes:
        if not isinstance(node.op, Norm):
            continue
        value = node.outputs[0]
        obstacle = sweep.obstacle(value)
        reader = sweep.readers[value][0] if obstacle is None else node
        if obstacle is not None:
            sweep.refuse(node, obstacle)
        elif node.op.heads != 1:
            sweep.refuse(node, f"it norms {node.op.heads} heads")
        elif isinstance(reader.op, Linear | FusedLinear) and reader.inputs[0] == value:
            op = reader.op if isinstance(reader.op, FusedLinear) else FusedLinear(None, _biases([reader]))
            inputs = node.inputs + reader.inputs[1:]
            new = Node(replace(op, norm=node.op), reader.name, inputs, reader.outputs, node.weights + reader.weights)
            sweep.merge(reader, [node], new, f"{node.name} goes with the quantisation of its input")


def fuse_post_norms(sweep: Sweep) -> None:
    """A norm of a block's output and the residual add that follows it (gemma2, olmo2)."""
    for node in sweep.nodes:
        if not isinstance(node.op, Add):
            continue
        for index in (1, 0):
            norm = sweep.source(node.inputs[index], Norm)
            if norm and isinstance(norm.op, Norm) and norm.op.heads == 1:
                inputs = (*norm.inputs, node.inputs[1 - index])
                new = Node(FusedNorm(norm.op), norm.name, inputs, node.outputs, norm.weights)
                sweep.merge(node, [norm], new, f"{norm.name} adds to {node.inputs[1 - index]}")
                break
        else:
            sweep.refuse(node, "neither input is a linear or a norm that it alone reads")


def _biases(linears: Iterable[Node]) -> tuple[bool, ...]:
    return tuple(isinstance(n.op, Linear) and n.op.bias for n in linears)


def _names(nodes: Iterable[Node]) -> str:
    return ", ".join(node.name for node in nodes)


PASSES: tuple[Callable[[Sweep], None], ...] = (
    fuse_attention,
    fuse_gates,
    group_linears,
    fuse_residuals,
    fuse_norms,
    fuse_post_norms,
)
