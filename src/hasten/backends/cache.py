"""Formats of the KV cache: one for all layers, or one for each; what a token takes in them."""

from __future__ import annotations

from hasten.errors import BackendError
from hasten.graph.graph import Graph
from hasten.graph.ops import Attention, FusedAttention

KvFormat = str | tuple[str, ...]
"""A format for all layers, or the format of each cache slot of the whole model."""
FORMATS = ("bf16", "int8", "int4", "f32")


def attentions(graph: Graph) -> list[Attention]:
    """The attention of a graph, fused or not, in execution order."""
    found = (n.op.attention if isinstance(n.op, FusedAttention) else n.op for n in graph.nodes)
    return [op for op in found if isinstance(op, Attention)]


def layers(graph: Graph) -> int:
    """Cache slots that a graph uses."""
    return max((op.layer + 1 for op in attentions(graph)), default=0)


def formats_of(graph: Graph, kv_format: KvFormat) -> tuple[str, ...]:
    """The format of each cache slot of `graph`, which may be cut from the model that `kv_format` is of.

    Raises BackendError for a format that does not exist, or a number of them that is not the model's number of layers.
    """
    count = layers(graph)
    for name in (kv_format,) if isinstance(kv_format, str) else kv_format:
        if name not in FORMATS:
            raise BackendError(f"kv_format is '{name}', must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if isinstance(kv_format, str):
        return (kv_format,) * count
    if graph.slots is None and count and len(kv_format) != count:
        what = f"a cache format is given for {len(kv_format)} layers, the model has {count}"
        raise BackendError(what, "give one for all, or one a layer")
    if graph.slots and len(kv_format) <= max(graph.slots):
        raise BackendError(f"a cache format is given for {len(kv_format)} layers, the model has more")
    return tuple(kv_format[slot] for slot in (range(count) if graph.slots is None else graph.slots))


def token_bytes(name: str, head_dim: int) -> int:
    """Bytes that a token's key, or its value, takes for one head: its numbers, scale and centre."""
    return {"f32": 4 * head_dim, "bf16": 2 * head_dim, "int8": head_dim + 2, "int4": (head_dim + 1) // 2 + 4}[name]
