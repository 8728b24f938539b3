"""What a fused region is called, and what it must read and multiply, beside sums done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bench.shapes import HEAD_DIM, HEADS, KV_HEADS, VOCABULARY, WIDTH, pack, tiny
from support import tiny_graph

from hasten import formats
from hasten.backends.batch import Batch
from hasten.bench.machine import Limits
from hasten.bench.regions import Counter, Need, Region, Span, describe
from hasten.bench.work import count
from hasten.graph.fuse import fuse
from hasten.graph.graph import Graph

INT8 = 1 + 2 / 32  # bytes of a number of int8-g32
KV = KV_HEADS * HEAD_DIM


def packed(graph: Graph, name: str = "int8-g32") -> dict[str, Any]:
    return {
        spec.name: formats.get(name).random(*spec.shape, seed=0) if spec.is_matrix else np.ones(spec.shape, np.float32)
        for spec in graph.weights.values()
    }


def labels(graph: Graph, weights: dict[str, Any]) -> list[str]:
    fused = fuse(graph)
    return [region.label for region in describe(fused, fused.nodes, weights)]


def test_labels_say_block_parts_shape_and_format() -> None:
    graph = tiny_graph(blocks=2, bias=True)
    block = [
        "q,k,v linear + norm + quantise [24 -> 64] int8-g32",
        "attention + rope",
        "o linear + residual + quantise [32 -> 24] int8-g32",
        "gate,up linear + norm + silu gate + quantise [24 -> 80] int8-g32",
        "down linear + residual + quantise [40 -> 24] int8-g32",
    ]
    assert labels(graph, packed(graph)) == [
        "embed [50, 24] int8-g32",
        *(f"block 0: {words}" for words in block),
        *(f"block 1: {words}" for words in block),
        "wanted rows",
        "head linear + norm + quantise [24 -> 50] int8-g32",
    ]


def test_labels_of_other_fusions() -> None:
    graph = tiny_graph(blocks=1, head_norms=True, post_norms=True, tied=False)
    found = labels(graph, packed(graph, "bf16"))
    assert found[1:4] == [
        "block 0: q,k,v linear + norm [24 -> 64] bf16",
        "block 0: attention + q,k norm + rope",
        "block 0: o linear [32 -> 24] bf16",
    ]
    assert "block 0: norm + residual" in found
    assert found[-1] == "head linear + norm [24 -> 50] bf16"


def test_several_formats_of_one_region_are_all_named() -> None:
    graph = tiny_graph(blocks=1)
    weights = packed(graph) | {"blocks.0.k.weight": formats.get("int4-g32").random(16, 24, seed=0)}
    assert "int8-g32,int4-g32" in labels(graph, weights)[1]


def needs(graph: Graph, weights: dict[str, Any], span: Span) -> dict[str, tuple[Region, Need]]:
    fused = fuse(graph)
    counter = Counter(fused, weights, kv_bytes=2)
    return {r.kind: (r, counter.need(r.node, span)) for r in describe(fused, fused.nodes, weights)}


DECODE = Span(((4, 4), (6, 6), (0, 0)), rows=3)  # three sequences that see 5, 7 and 1 keys


def test_decode_by_hand() -> None:
    graph = tiny(tied=False)
    found = {kind: need for kind, (_, need) in needs(graph, pack(graph, {"wk": "bf16"}), DECODE).items()}
    rows = WIDTH + KV
    assert found == {
        "embed": Need(int(3 * (WIDTH * INT8 + 4))),
        "wq,wk,wv linear": Need(
            int(rows * WIDTH * INT8 + KV * WIDTH * 2 + 4 * WIDTH + 3 * WIDTH * 4), 3 * rows * WIDTH, 3 * KV * WIDTH
        ),
        "attention": Need(13 * 2 * KV * 2 + 3 * (WIDTH + 2 * KV) * 4, 0, 13 * 2 * HEADS * HEAD_DIM),
        "wanted rows": Need(3 * WIDTH * 4),
        "head linear + norm": Need(int(VOCABULARY * WIDTH * INT8 + 4 * WIDTH + 3 * WIDTH * 4), 3 * VOCABULARY * WIDTH),
    }


def test_a_chunk_that_wants_no_rows_leaves_the_head_out() -> None:
    graph = tiny(tied=True)
    found = needs(graph, pack(graph, {}), Span(((0, 7),), rows=0))
    assert found["head linear + norm"][1] == found["wanted rows"][1] == Need()
    assert found["embed"][1].bytes > 0


@pytest.mark.parametrize(
    ("window", "span", "keys", "scores"),
    [
        (None, ((0, 4),), 5, 15),
        (None, ((3, 4),), 5, 9),
        (3, ((0, 4),), 5, 1 + 2 + 3 + 3 + 3),
        (3, ((3, 4),), 4, 6),  # queries 3 and 4 see keys 1 to 4
        (3, ((3, 4), (9, 9)), 4 + 3, 6 + 3),
    ],
)
def test_attention_reads_what_the_mask_lets_through(
    window: int | None, span: tuple[tuple[int, int], ...], keys: int, scores: int
) -> None:
    graph = tiny(tied=True, window=window)
    found = needs(graph, pack(graph, {}), Span(span, rows=1))
    region, need = found["attention" if window is None else "attention over 3"]
    tokens = sum(last - first + 1 for first, last in span)
    assert need == Need(2 * KV * 2 * keys + 4 * tokens * (WIDTH + 2 * KV), 0, 2 * HEADS * HEAD_DIM * scores)
    assert region.block is None


@pytest.mark.parametrize("tied", [True, False])
def test_regions_add_up_to_the_model(tied: bool) -> None:
    """Beside work.count, which walks the graph before fusion."""
    graph = tiny_graph(tied=tied, bias=True)
    weights = packed(graph)
    work, found = count(graph, weights), fuse(graph)
    counter = Counter(found, weights, work.kv_bytes)
    every = [counter.need(node, Span(((0, 11),), rows=1)) for node in found.nodes]
    assert sum(n.int_macs for n in every) == work.token_macs[0] * 12 + work.row_macs[0]
    assert sum(n.float_macs for n in every) == work.attention_macs(12)
    once, twice = (sum(counter.need(n, Span(((p, p),), rows=1)).bytes for n in found.nodes) for p in (20, 21))
    assert twice - once == work.decode_bytes(21, 1) - work.decode_bytes(20, 1)
    activations = (
        once - work.decode_bytes(20, 1) - (weights["embed.weight"].nbytes // 50 if tied else 0)
    )  # the row of a tied table is read twice
    assert 0 < activations < 10_000


def test_least_times() -> None:
    limits = Limits(memory_read_gbs=2.0, int8_gmacs=10.0, bf16_gmacs=5.0, threads=1)
    need = Need(bytes=4_000, int_macs=30_000, float_macs=10_000)
    assert need.memory_seconds(limits) == pytest.approx(2e-6)
    assert need.arithmetic_seconds(limits) == pytest.approx(3e-6 + 2e-6)


def test_the_span_of_a_batch() -> None:
    ragged = Batch(
        tokens=np.zeros(4, np.int32),
        positions=np.array([5, 6, 7, 2], np.int32),
        starts=np.array([0, 3, 4], np.int32),
        block_tables=np.zeros((2, 1), np.int32),
        rows=np.array([2, 3], np.int32),
    )
    span = Span.of(ragged)
    assert span == Span(((5, 7), (2, 2)), rows=2)
    assert span.tokens == 4
