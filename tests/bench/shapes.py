"""A tiny graph whose work can be added up by hand."""

from __future__ import annotations

import numpy as np

from hasten import formats
from hasten.graph.graph import Graph, GraphBuilder
from hasten.graph.ops import Attention, Embed, Linear, Norm, SelectRows

WIDTH, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16


def tiny(tied: bool, window: int | None = None) -> Graph:
    b = GraphBuilder(context=64, vocabulary=VOCABULARY, hidden=WIDTH)
    table = b.weight("embed", VOCABULARY, WIDTH)
    x = b.add(Embed(), "x", "tokens", weights=(table,))
    kv = KV_HEADS * HEAD_DIM
    q = b.add(Linear(bias=True), "q", x, weights=(b.weight("wq", WIDTH, WIDTH), b.weight("bq", WIDTH)))
    k = b.add(Linear(), "k", x, weights=(b.weight("wk", kv, WIDTH),))
    v = b.add(Linear(), "v", x, weights=(b.weight("wv", kv, WIDTH),))
    a = b.add(Attention(HEADS, KV_HEADS, HEAD_DIM, 0.25, 0, window), "a", q, k, v)
    rows = b.add(SelectRows(), "rows", a)
    normed = b.add(Norm(), "normed", rows, weights=(b.weight("norm", WIDTH),))
    head = table if tied else b.weight("head", VOCABULARY, WIDTH)
    return b.finish(b.add(Linear(), "logits", normed, weights=(head,)))


def pack(graph: Graph, matrices: dict[str, str]) -> dict[str, object]:
    return {
        name: formats.get(matrices.get(name, "int8-g32")).random(*spec.shape, seed=0)
        if spec.is_matrix
        else np.ones(spec.shape, np.float32)
        for name, spec in graph.weights.items()
    }
