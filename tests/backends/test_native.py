"""The native backend against formulas in float64, over graphs of every kind."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import TOKENS_OF, batch, limits, pack
from random_graphs import graphs
from support import random_arrays, tiny_graph

from hasten import _native, formats
from hasten.backends import native, reference
from hasten.graph.graph import TOKENS, GraphBuilder
from hasten.graph.ops import (
    Activation,
    Attention,
    Embed,
    Gate,
    Linear,
    Multiply,
    Norm,
    Rope,
    SelectRows,
    Softcap,
    Span,
)

EXACT = {"rtol": 2e-5, "atol": 2e-5}


GRAPHS = {
    "llama": {},
    "qwen2": {"bias": True, "kv_heads": 1},
    "qwen3": {"head_norms": True, "kv_heads": 4},
    "gemma2": {"post_norms": True, "tied": False},
    "olmo2": {"pre_norms": False, "post_norms": True, "head_norms": True, "head_dim": 12},
}


@pytest.mark.parametrize("isa", _native.matmul.isas())
@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
def test_float_weights_give_the_formulas(options, isa):
    graph = tiny_graph(**options)
    arrays = random_arrays(graph)
    for name in ("f32", "f16"):
        weights = pack(graph, arrays, name)
        found = native.compile(graph, weights, limits(), isa=isa).step(batch(TOKENS_OF)).logits()
        expected = reference.forward(graph, reference.dense_weights(weights), TOKENS_OF)
        np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.parametrize("isa", _native.matmul.isas())
def test_bfloat16_weights_give_the_formulas(isa):
    # Instruction sets with bfloat16 products round the activations too: 8 bits each, over two blocks.
    graph = tiny_graph()
    weights = pack(graph, random_arrays(graph), "bf16")
    found = native.compile(graph, weights, limits(), isa=isa).step(batch(TOKENS_OF)).logits()
    expected = reference.forward(graph, reference.dense_weights(weights), TOKENS_OF)
    tolerance = 0.1 if _native.matmul.bf16_inputs(isa) else 2e-5
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def round_to_int8(x, group):
    """What the core multiplies by: each group of a row as int8 times the group's largest magnitude / 127."""
    columns = x.shape[-1]
    padded = np.pad(x, ((0, 0), (0, -columns % group))).reshape(len(x), -1, group)
    scale = np.abs(padded).max(-1, keepdims=True) / 127
    codes = np.rint(np.divide(padded, scale, out=np.zeros_like(padded), where=scale > 0))
    return (codes * scale).reshape(len(x), -1)[:, :columns]


def forward_int8(graph, weights, tokens, group):
    """The graph's formulas in float64, with every linear's input rounded to int8."""
    dense = reference.dense_weights(weights)
    values, span = {TOKENS: tokens}, Span(np.arange(len(tokens)))
    for node in graph.nodes:
        inputs = tuple(values[v] for v in node.inputs)
        if isinstance(node.op, Linear):
            inputs = (round_to_int8(inputs[0], group),)
        made = node.op.formula(inputs, tuple(dense[w] for w in node.weights), span)
        values.update(zip(node.outputs, made, strict=True))
    return values[graph.output]


@pytest.mark.parametrize("isa", _native.matmul.isas())
@pytest.mark.parametrize("name", [n for n in formats.names() if "-g" in n])
def test_grouped_weights_give_the_formulas_over_rounded_inputs(name, isa):
    graph = tiny_graph(hidden=72, feed_forward=136, head_dim=20)
    weights = pack(graph, random_arrays(graph), name)
    found = native.compile(graph, weights, limits(), isa=isa).step(batch(TOKENS_OF)).logits()
    expected = forward_int8(graph, weights, TOKENS_OF, formats.get(name).group)
    # A float32 that falls on the other side of a half than its float64 moves one code of 127; most rows have none.
    rows = np.abs(found - expected).max(axis=1)
    assert np.median(rows) < 2e-3
    # One bit rounded to the nearest makes every weight as large as its group's largest, and such steps as much larger.
    assert rows.max() < (0.2 if name.startswith(("int1", "codebook1")) else 0.1)
    unrounded = np.abs(reference.forward(graph, reference.dense_weights(weights), TOKENS_OF) - expected).max(axis=1)
    assert np.median(rows) < np.median(unrounded) / 5  # the test can tell


def test_parts_of_one_linear_may_have_any_formats():
    graph = tiny_graph(hidden=72, feed_forward=136, bias=True)
    arrays = random_arrays(graph)
    mixed = {
        "blocks.0.q.weight": "int4-g64",
        "blocks.0.k.weight": "f32",
        "blocks.0.v.weight": "int8-g32",
        "blocks.1.gate.weight": "bf16",
        "blocks.1.up.weight": "codebook4-g128",
    }
    weights = pack(graph, arrays, mixed)
    program = native.compile(graph, weights, limits(), keep=["blocks.0.k", "blocks.0.v", "blocks.0.attention_norm"])
    out = program.step(batch(TOKENS_OF))
    dense = reference.dense_weights(weights)
    normed = out.value("blocks.0.attention_norm").astype(np.float64)
    k = normed @ dense["blocks.0.k.weight"].T + dense["blocks.0.k.bias"]
    np.testing.assert_allclose(out.value("blocks.0.k"), k, **EXACT)
    v = round_to_int8(normed, 32) @ dense["blocks.0.v.weight"].T + dense["blocks.0.v.bias"]
    np.testing.assert_allclose(out.value("blocks.0.v"), v, rtol=1e-2, atol=1e-2)
    expected = reference.forward(graph, dense, TOKENS_OF)
    assert np.abs(out.logits() - expected).max() < 0.1 * np.abs(expected).max()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(), st.integers(1, 16))
def test_graphs_of_any_shape(graph, count):
    tokens = np.arange(count, dtype=np.int32) % 5
    weights = pack(graph, random_arrays(graph))
    program = native.compile(graph, weights, limits(context=16))
    expected = reference.forward(graph, reference.dense_weights(weights), tokens)
    np.testing.assert_allclose(program.step(batch(tokens)).logits(), expected, rtol=1e-3, atol=1e-4)


def odd_graph():
    """What no model of today has all at once."""
    g = GraphBuilder(context=64, vocabulary=50, hidden=24)
    x = g.add(Embed(scale=2.5), "embed", TOKENS, weights=(g.weight("table", 50, 24),))
    weights = (g.weight("norm.weight", 24), g.weight("norm.bias", 24))
    n = g.add(Norm("layer", eps=1e-5, offset=1.0, bias=True), "norm", x, weights=weights)
    q = g.add(Norm(heads=3), "q_norm", n, weights=(g.weight("q_norm", 8),))
    q = g.add(Rope(3, 8, (1.0, 0.25), 1.5), "q", q)
    k = g.add(Rope(3, 8, (0.5,), 0.75), "k", n)
    a = g.add(Attention(3, 3, 8, 0.3, layer=0, window=5, softcap=2.0), "a", q, k, n)
    b = g.add(Attention(3, 3, 8, 0.3, layer=1, causal=False), "b", n, k, a)
    c = g.add(Multiply(), "c", b, g.add(Activation("gelu_tanh"), "act", x))
    d = g.add(Gate("gelu"), "d", g.add(Multiply(0.3), "m", c), a)
    r = g.add(SelectRows(), "rows", d)
    logits = g.add(Linear(), "head", r, weights=("table",))
    return g.finish(g.add(Softcap(3.0), "logits", logits))


@pytest.mark.parametrize("isa", _native.matmul.isas())
def test_odd_ops(isa):
    graph = odd_graph()
    weights = pack(graph, random_arrays(graph))
    keep = ["norm", "q", "b", "rows"]
    out = native.compile(graph, weights, limits(), keep, isa=isa).step(batch(TOKENS_OF, rows=[39, 3, 3]))
    rows = np.array([39, 3, 3])
    expected = reference.values(graph, reference.dense_weights(weights), TOKENS_OF, rows=rows)
    for name in [*keep, "logits"]:
        np.testing.assert_allclose(out.value(name), expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("kv_format", "far"), [("bf16", 0.01), ("int8", 0.02), ("int4", 0.2), (("int8", "int4"), 0.2)])
def test_a_rounded_cache_is_near(kv_format, far):
    graph = tiny_graph()
    weights = pack(graph, random_arrays(graph))
    exact, near = (
        native.compile(graph, weights, limits(kv_format=kv)).step(batch(TOKENS_OF)).logits()
        for kv in ("f32", kv_format)
    )
    assert 0 < np.linalg.norm(exact - near) < far * np.linalg.norm(exact)


def test_a_block_alone_gives_what_it_gives_in_the_graph():
    graph = tiny_graph(blocks=3)
    weights = pack(graph, random_arrays(graph), "int8-g32")
    block = graph.blocks[1]
    inside = "blocks.1.gated"
    whole = native.compile(graph, weights, limits(), keep=[block.input, block.output, inside]).step(batch(TOKENS_OF))
    alone = native.compile(graph.block(1), weights, limits(), keep=[inside]).step(
        batch(TOKENS_OF, hidden=whole.value(block.input))
    )
    np.testing.assert_array_equal(alone.logits(), whole.value(block.output))
    np.testing.assert_array_equal(alone.value(inside), whole.value(inside))
