"""The fused regions of a program: what each is called, and what it must read and multiply at least in a given step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.backends.batch import Batch
from hasten.bench.machine import Limits
from hasten.formats import Weight
from hasten.graph import ops
from hasten.graph.graph import TOKENS, Graph, Node

FLOAT = 4  # bytes of a number between regions


@dataclass(frozen=True)
class Need:
    """The least that a region has to do: bytes read once each, and multiply-accumulates by the limit they run into."""

    bytes: int = 0
    int_macs: int = 0
    """Of quantised weights."""
    float_macs: int = 0
    """Of all other weights, and of attention; held, as in `work`, against the best instruction for bf16 weights."""

    def memory_seconds(self, limits: Limits) -> float:
        return self.bytes / (limits.memory_read_gbs * 1e9)

    def arithmetic_seconds(self, limits: Limits) -> float:
        return self.int_macs / (limits.int8_gmacs * 1e9) + self.float_macs / (limits.bf16_gmacs * 1e9)


@dataclass(frozen=True)
class Region:
    """One plan step."""

    kind: str
    """What it computes, the same words in every block: "q,k,v linear + norm"."""
    block: int | None
    shape: str
    """Of its matrices together, "[896 -> 1152]"; "" where it has none."""
    format: str
    """Of its matrices; "" where it has none."""
    quantises: bool
    node: Node

    @property
    def label(self) -> str:
        """All that names it: "block 3: q,k,v linear + norm + quantise [896 -> 1152] int4-g128"."""
        place = "" if self.block is None else f"block {self.block}: "
        words = [self.kind + " + quantise" * self.quantises, self.shape, self.format]
        return place + " ".join(word for word in words if word)


@dataclass(frozen=True)
class Span:
    """What a step computes: the first and last position of each sequence, and how many rows are wanted."""

    positions: tuple[tuple[int, int], ...]
    rows: int

    @property
    def tokens(self) -> int:
        return sum(last - first + 1 for first, last in self.positions)

    @staticmethod
    def of(batch: Batch) -> Span:
        ends = zip(batch.positions[batch.starts[:-1]], batch.positions[batch.starts[1:] - 1], strict=True)
        return Span(tuple((int(first), int(last)) for first, last in ends), len(batch.rows))


# --- names


def describe(graph: Graph, plan: Iterable[Node], weights: Mapping[str, Any]) -> list[Region]:
    """The region of each plan step of a fused graph, in order."""
    block_of = {node.outputs[0]: i for i, b in enumerate(graph.blocks) for node in graph.nodes[b.start : b.stop]}
    selected = graph.row_values()
    regions = []
    for node in plan:
        block = block_of.get(node.outputs[0])
        matrices = [(name, weights[name]) for name in node.weights if isinstance(weights[name], Weight)]
        linear = isinstance(node.op, ops.Linear | ops.FusedLinear)
        head = linear and block is None and node.outputs[0] in selected
        parts = ["head"] if head else [part_name(name) for name, _ in matrices]
        columns, rows = (matrices[0][1].shape[1], sum(w.shape[0] for _, w in matrices)) if matrices else (0, 0)
        regions.append(
            Region(
                kind=kind_of(node.op, parts),
                block=block,
                shape=f"[{columns} -> {rows}]" if linear else f"[{rows}, {columns}]" if matrices else "",
                format=",".join(dict.fromkeys(w.format.name for _, w in matrices)),
                quantises=linear and any(w.format.group for _, w in matrices),
                node=node,
            )
        )
    return regions


def part_name(weight: str) -> str:
    """ "model.layers.3.self_attn.q_proj.weight" -> "q"."""
    return weight.removesuffix(".weight").rsplit(".", 1)[-1].removesuffix("_proj")


def kind_of(op: ops.Op, parts: list[str]) -> str:
    """An op in a few words; `parts` names the matrices of a linear."""
    match op:
        case ops.Linear():
            return f"{','.join(parts)} linear"
        case ops.FusedLinear(norm=norm, gate=gate, residual=residual):
            more = ["norm"] * (norm is not None) + [f"{gate} gate"] * (gate is not None) + ["residual"] * residual
            return " + ".join([f"{','.join(parts)} linear", *more])
        case ops.Attention(window=window):
            return "attention" if window is None else f"attention over {window}"
        case ops.FusedAttention(attention=attention, q_norm=q_norm, k_norm=k_norm, rope=rope):
            norms = ",".join(["q"] * (q_norm is not None) + ["k"] * (k_norm is not None))
            more = [f"{norms} norm"] * bool(norms) + ["rope"] * (rope is not None)
            return " + ".join([kind_of(attention, parts), *more])
        case ops.FusedNorm():
            return "norm + residual"
        case ops.SelectRows():
            return "wanted rows"
        case ops.Input():
            return "hidden states"
        case ops.Activation(kind=kind):
            return kind
        case ops.Gate(kind=kind):
            return f"{kind} gate"
    return type(op).__name__.lower()


# --- numbers


class Counter:
    """What each region of one program needs for a step."""

    def __init__(self, graph: Graph, weights: Mapping[str, Any], kv_bytes: float) -> None:
        """`kv_bytes`: of one number in the cache, its share of a scale included."""
        self._graph, self._weights, self._kv_bytes = graph, weights, kv_bytes
        self._widths, self._selected = {**graph.widths(), TOKENS: 1}, graph.row_values()

    def need(self, node: Node, span: Span) -> Need:
        """Weights, inputs (float32) and cache are read once each; a region without rows does nothing.

        An embedding is read a row a token, the cache only where the mask lets through.
        """
        count = span.rows if node.outputs[0] in self._selected else span.tokens
        if count == 0:
            return Need()
        inputs = FLOAT * sum(self._widths[v] for v in node.inputs) * count
        match node.op:
            case ops.Embed():
                table = self._weights[node.weights[0]]
                return Need(inputs + count * (table.nbytes // table.shape[0]))
            case ops.Attention() as attention:
                return self._attention(attention, inputs, node, span)
            case ops.FusedAttention(attention=attention):
                return self._attention(attention, inputs, node, span)
        used = [self._weights[name] for name in node.weights]
        macs = [0, 0]
        for weight in used:
            if isinstance(weight, Weight):
                macs[0 if weight.format.group else 1] += count * weight.shape[0] * weight.shape[1]
        return Need(inputs + sum(w.nbytes for w in used), macs[0], macs[1])

    def _attention(self, a: ops.Attention, inputs: int, node: Node, span: Span) -> Need:
        keys = pairs = 0
        for first, last in span.positions:
            keys += last + 1 - max(0, first + 1 - (a.window or first + 1))
            pairs += scores(a, first, last)
        cache = round(2 * a.kv_heads * a.head_dim * keys * self._kv_bytes)
        vectors = sum(self._weights[name].nbytes for name in node.weights)
        return Need(inputs + cache + vectors, 0, 2 * a.heads * a.head_dim * pairs)


def scores(attention: ops.Attention, first: int, last: int) -> int:
    """How many keys the queries at positions first..last see, all together."""
    if not attention.causal:
        return (last + 1 - first) * (last + 1)
    positions = np.arange(first, last + 1, dtype=np.int64)
    return int(np.minimum(positions + 1, attention.window or last + 1).sum())
