"""Bytes that a compiled program holds beside weights, cache and arena: as native/plan sizes them, in a few formulas."""

from __future__ import annotations

from collections.abc import Mapping

from hasten import _native, formats
from hasten.backends import cache
from hasten.backends.batch import Limits
from hasten.backends.host import active_isa
from hasten.graph.graph import Graph, Node
from hasten.graph.ops import Attention, FusedAttention, FusedLinear, Linear, Rope

ALONE = 4096  # elements of input that each thread prepares for itself
WAYS = ((2, 128, 128 << 10), (6, 256, 512 << 10))  # chunks a thread, tokens, bytes of output: the widest of tuning.cpp
QUERY_TILE = 32
SCORE_ROWS = 8
TILE_KEYS, SPAN_KEYS = 64, 512  # that attention takes at a time; that threads share out
CUT_SEQUENCES = 16  # whose keys may be cut over threads at once


def beside_arena(fused: Graph, limits: Limits, stored: Mapping[str, str] | None, threads: int) -> int:
    """Rope tables, what the threads share, and each thread's own. `stored`: formats of matrices; None: all f32."""
    shared = own = 0
    for node in fused.nodes:
        if isinstance(node.op, Linear | FusedLinear):
            parts = _linear(fused, node, limits, stored, threads)
        elif isinstance(node.op, Attention | FusedAttention):
            parts = _attention(fused, node, limits, threads)
        else:
            continue
        shared, own = max(shared, parts[0]), max(own, parts[1])
    return _rope_tables(fused, limits) + shared + _round_up(own, 4096) * threads


def _rope_tables(fused: Graph, limits: Limits) -> int:
    ropes = {
        (rope.frequencies, rope.factor)
        for op in (node.op for node in fused.nodes)
        if (rope := op.rope if isinstance(op, FusedAttention) else op if isinstance(op, Rope) else None)
    }
    return sum(8 * limits.context * len(frequencies) for frequencies, _ in ropes)


def _linear(
    fused: Graph, node: Node, limits: Limits, stored: Mapping[str, str] | None, threads: int
) -> tuple[int, int]:
    """(shared, for each thread) bytes of the input's prepared forms, and of what kernels unpack."""
    op = node.op
    names = [name for name in node.weights if fused.weights[name].is_matrix]
    width = fused.weights[names[0]].shape[1]
    chosen = [formats.get(stored[name] if stored else "f32") for name in names]
    groups = [format.group for format in chosen if format.group]
    dense = len(groups) < len(chosen)
    padded = _round_up(width, 64)
    token = 4 * _round_up(width, 16) if dense and isinstance(op, FusedLinear) and op.norm else 0
    token += padded + 8 * -(-width // min(groups)) if groups else 0
    most = limits.max_rows if node.inputs[0] in fused.row_values() else limits.max_tokens
    alone = min(max(1, ALONE // width), most)
    active_isa()  # says how to mend a wrong HASTEN_ISA
    shapes = [fused.weights[name].shape for name in names]
    kernels = [_native.kernel_scratch(f.kind, *s, f.group, most) for f, s in zip(chosen, shapes, strict=True)]
    gate = _gate_tile(shapes[0][0], most, threads) if isinstance(op, FusedLinear) and op.gate else 0
    return token * most, token * alone + 4 * width + gate + max(kernels)


def _gate_tile(rows: int, most: int, threads: int) -> int:
    """Bytes of gate and up of a chunk, in the widest of the ways to cut that are tried."""
    panels = -(-rows // 16)
    tile = 0
    for chunks, tokens, cached in WAYS:
        tokens = min(tokens, most)
        across = max(2, min(-(-panels // (threads * chunks)), cached // (128 * tokens)) // 2 * 2)
        tile = max(tile, 128 * tokens * across)
    return tile


def _attention(fused: Graph, node: Node, limits: Limits, threads: int) -> tuple[int, int]:
    """(shared, for each thread) bytes of turned queries, keys and results of spans, and of a query tile at work."""
    op = node.op
    a = op.attention if isinstance(op, FusedAttention) else op
    assert isinstance(a, Attention)
    copied = isinstance(op, FusedAttention) and (op.q_norm or op.k_norm or op.rope)
    strides = sum(_round_up(heads * a.head_dim, 16) for heads in (a.heads, a.kv_heads))
    rows = min(QUERY_TILE, limits.max_tokens) * (a.heads // a.kv_heads)
    width = _round_up(a.head_dim, 16)
    tile = limits.block_size * max(1, TILE_KEYS // limits.block_size)
    own = rows * (4 * a.head_dim + 8 * width + 36) + 256 + 4 * tile * (SCORE_ROWS + a.head_dim + width + 4)
    if cache.formats_of(fused, limits.kv_format)[a.layer] == "int4":
        own += tile * (2 * a.head_dim + 1 + a.head_dim % 2)  # unpacked codes of keys and values
    spans = -(-limits.context // (limits.block_size * max(1, SPAN_KEYS // limits.block_size)))
    cut = (
        4 * min(limits.max_sequences, CUT_SEQUENCES) * spans * (a.heads * (width + 2) + 32 * a.kv_heads)
        if threads > 1 and spans > 1
        else 0
    )
    return (4 * limits.max_tokens * strides if copied else 0) + cut, own


def _round_up(count: int, to: int) -> int:
    return -(-count // to) * to
