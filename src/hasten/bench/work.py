"""What a graph has to do at least: multiply-accumulates and bytes read, and the least time a machine needs for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.backends.cache import KvFormat
from hasten.bench.machine import Limits
from hasten.engine import memory
from hasten.formats import Weight
from hasten.graph.graph import Graph
from hasten.graph.ops import Attention, Embed, Linear, SelectRows


@dataclass(frozen=True)
class Work:
    """Work of one model. Int multiply-accumulates are those of quantised weights; all others count as float ones."""

    parameters: int
    bits_per_weight: float
    """Stored bits of the matrices, scales and padding included, over their parameters."""
    token_macs: tuple[int, int]
    """(int, float) for each token, attention left out."""
    row_macs: tuple[int, int]
    """(int, float) for each row whose logits are wanted: the head."""
    step_bytes: int
    """Weights that every step reads once, however many tokens it has."""
    token_bytes: int
    """Weights that each token reads: its row of the embedding."""
    attention: tuple[Attention, ...]
    kv_bytes: float
    """Bytes of one number in the KV cache, its share of a scale included."""

    def prompt_seconds(self, prompt: int, limits: Limits) -> float:
        """The least time for one prompt and its first token: every product at the limit of its kind."""
        integer = self.token_macs[0] * prompt + self.row_macs[0]
        floating = self.token_macs[1] * prompt + self.row_macs[1] + self.attention_macs(prompt)
        return integer / (limits.int8_gmacs * 1e9) + floating / (limits.bf16_gmacs * 1e9)

    def attention_macs(self, prompt: int) -> int:
        """Scores and weighted values of a prompt from an empty cache, only where the mask lets them through."""
        return sum(2 * a.heads * a.head_dim * sum(seen(a, p) for p in range(prompt)) for a in self.attention)

    def decode_bytes(self, position: int, batch: int) -> int:
        """Bytes that one step must read in which each of `batch` sequences decodes its token at `position`."""
        cache = sum(2 * a.kv_heads * a.head_dim * seen(a, position) for a in self.attention) * self.kv_bytes
        return self.step_bytes + batch * (self.token_bytes + round(cache))

    def decode_seconds(self, prompt: int, new: int, batch: int, limits: Limits) -> float:
        """The least time for `new` steps from depth `prompt`: every byte read once, or every product, if longer."""
        positions = range(prompt, prompt + new)
        read = sum(self.decode_bytes(p, batch) for p in positions) / (limits.memory_read_gbs * 1e9)
        attention = sum(2 * a.heads * a.head_dim * seen(a, p) for a in self.attention for p in positions)
        integer, floating = (new * (t + r) for t, r in zip(self.token_macs, self.row_macs, strict=True))
        products = integer / (limits.int8_gmacs * 1e9) + (floating + attention) / (limits.bf16_gmacs * 1e9)
        return max(read, batch * products)


def seen(attention: Attention, position: int) -> int:
    """How many keys a query at `position` sees."""
    return min(position + 1, attention.window or position + 1)


def count(graph: Graph, weights: Mapping[str, Any], kv_format: KvFormat = "bf16") -> Work:
    """Add up the work of an unfused graph with these weights (Weight for matrices, float32 arrays for vectors)."""
    rows: set[str] = set()  # values that exist only for wanted rows
    macs = {"token": [0, 0], "row": [0, 0]}
    read: dict[str, int] = {}  # weights read whole by every step
    embedded: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node.op, SelectRows) or rows.intersection(node.inputs):
            rows.update(node.outputs)
        for name in node.weights:
            weight = weights[name]
            if isinstance(node.op, Embed):
                embedded[name] = weight.nbytes // graph.weights[name].shape[0]
                continue
            read[name] = weight.nbytes
            if isinstance(node.op, Linear) and isinstance(weight, Weight):
                place = macs["row" if rows.intersection(node.outputs) else "token"]
                place[0 if weight.format.group else 1] += weight.shape[0] * weight.shape[1]
    matrices = [w for w in weights.values() if isinstance(w, Weight)]
    attention = tuple(n.op for n in graph.nodes if isinstance(n.op, Attention))
    cached = sum(2 * a.kv_heads * a.head_dim for a in attention)  # numbers of a token
    stored = sum(w.shape[0] * w.shape[1] for w in matrices)
    return Work(
        parameters=graph.parameters(),
        bits_per_weight=sum(w.nbytes for w in matrices) * 8 / max(stored, 1),
        token_macs=(macs["token"][0], macs["token"][1]),
        row_macs=(macs["row"][0], macs["row"][1]),
        step_bytes=sum(read.values()),
        token_bytes=sum(size for name, size in embedded.items() if name not in read),
        attention=attention,
        kv_bytes=memory.kv_bytes(graph, kv_format) / max(cached, 1),
    )
