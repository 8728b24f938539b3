"""What many tests share: where the real material lies, and a tiny graph with random weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hasten.graph.graph import TOKENS, Graph, GraphBuilder
from hasten.graph.ops import Add, Attention, Embed, Gate, Linear, Norm, Rope, SelectRows

ROOT = Path(__file__).resolve().parents[1]


def shared_data(*parts: str) -> Path | None:
    """The file or folder `parts` of the shared data (HASTEN_SHARED_DATA, else ../shared/data), or None where absent."""
    base = Path(os.environ.get("HASTEN_SHARED_DATA") or ROOT.parent / "shared" / "data")
    path = base.joinpath(*parts)
    return path if path.exists() else None


def need_shared_data(*parts: str) -> Path:
    """As shared_data, but skips the test where the material is absent."""
    path = shared_data(*parts)
    if path is None:
        pytest.skip(f"shared data {'/'.join(parts)} is not here (set HASTEN_SHARED_DATA)")
    return path


def tiny_graph(
    *,
    blocks: int = 2,
    hidden: int = 24,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    feed_forward: int = 40,
    vocabulary: int = 50,
    bias: bool = False,
    head_norms: bool = False,
    pre_norms: bool = True,
    post_norms: bool = False,
    tied: bool = True,
) -> Graph:
    """A llama-like graph of odd sizes: `bias` as qwen2, `head_norms` as qwen3, both norms as gemma2, post as olmo2."""
    g = GraphBuilder(context=64, vocabulary=vocabulary, hidden=hidden)
    frequencies = tuple(10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2))
    attention_scale = head_dim**-0.5

    def norm(name: str, x: str, width: int = hidden, parts: int = 1) -> str:
        return g.add(Norm(heads=parts), name, x, weights=(g.weight(f"{name}.weight", width),))

    def linear(name: str, x: str, out: int, width: int, biased: bool = False) -> str:
        weights = (g.weight(f"{name}.weight", out, width),)
        return g.add(Linear(biased), name, x, weights=weights + ((g.weight(f"{name}.bias", out),) if biased else ()))

    x = g.add(Embed(), "embed", TOKENS, weights=(g.weight("embed.weight", vocabulary, hidden),))
    for i in range(blocks):
        start, entry, at = g.begin_block(), x, f"blocks.{i}"
        h = norm(f"{at}.attention_norm", x) if pre_norms else x
        q = linear(f"{at}.q", h, heads * head_dim, hidden, bias)
        k = linear(f"{at}.k", h, kv_heads * head_dim, hidden, bias)
        v = linear(f"{at}.v", h, kv_heads * head_dim, hidden, bias)
        if head_norms:
            q = norm(f"{at}.q_norm", q, head_dim, heads)
            k = norm(f"{at}.k_norm", k, head_dim, kv_heads)
        q = g.add(Rope(heads, head_dim, frequencies), f"{at}.q_rope", q)
        k = g.add(Rope(kv_heads, head_dim, frequencies), f"{at}.k_rope", k)
        h = g.add(Attention(heads, kv_heads, head_dim, attention_scale, i), f"{at}.attention", q, k, v)
        h = linear(f"{at}.o", h, hidden, heads * head_dim)
        x = g.add(Add(), f"{at}.attention_out", x, norm(f"{at}.attention_post", h) if post_norms else h)
        h = norm(f"{at}.mlp_norm", x) if pre_norms else x
        gate, up = linear(f"{at}.gate", h, feed_forward, hidden), linear(f"{at}.up", h, feed_forward, hidden)
        h = linear(f"{at}.down", g.add(Gate("silu"), f"{at}.gated", gate, up), hidden, feed_forward)
        x = g.add(Add(), f"{at}.out", x, norm(f"{at}.mlp_post", h) if post_norms else h)
        g.end_block(start, entry, x)
    x = norm("norm", g.add(SelectRows(), "rows", x))
    table = "embed.weight" if tied else g.weight("head.weight", vocabulary, hidden)
    return g.finish(g.add(Linear(), "logits", x, weights=(table,)))


def random_arrays(graph: Graph, seed: int = 0) -> dict[str, npt.NDArray[np.float64]]:
    """Float64 weights for `graph`: matrices that keep the size of what they multiply, vectors around one."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.normal(0.0, spec.shape[1] ** -0.5, spec.shape)
        if spec.is_matrix
        else rng.normal(1.0, 0.2, spec.shape)
        for spec in graph.weights.values()
    }
