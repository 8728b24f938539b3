"""Each formula in float64 against an independent, plain statement; each shape rule against what it must refuse."""

import cmath
import math

import array_api_strict
import numpy as np
import pytest

from hasten.errors import ConfigError
from hasten.graph.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    FusedAttention,
    FusedLinear,
    FusedNorm,
    Gate,
    Input,
    Linear,
    Multiply,
    Norm,
    Rope,
    SelectRows,
    Softcap,
    Span,
)

TOKENS = 7
RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.normal(size=shape)


def run(op, inputs, weights=(), *, first=0, rows=None):
    return op.formula(tuple(inputs), tuple(weights), Span(np.arange(first, first + TOKENS), rows))[0]


def plain_norm(op, x, weight, bias):
    out = np.empty_like(x)
    size = x.shape[1] // op.heads
    for t in range(len(x)):
        for start in range(0, x.shape[1], size):
            part = [float(v) for v in x[t, start : start + size]]
            mean = sum(part) / size if op.kind == "layer" else 0.0
            spread = math.sqrt(sum((v - mean) ** 2 for v in part) / size + op.eps)
            for i, v in enumerate(part):
                out[t, start + i] = (v - mean) / spread * (weight[i] + op.offset) + (bias[i] if op.bias else 0.0)
    return out


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("heads", "offset", "bias"), [(1, 0.0, False), (3, 1.0, False), (1, 0.0, True), (5, 1.0, True)]
)
def test_norm(kind, heads, offset, bias):
    op = Norm(kind, 1e-3, heads, offset, bias)
    x, weight, beta = normal(TOKENS, 15), normal(15 // heads), normal(15 // heads)
    expected = plain_norm(op, x, weight, beta)
    np.testing.assert_allclose(run(op, [x], [weight, beta][: 1 + bias]), expected, rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    x, weight, beta = normal(TOKENS, 5), normal(9, 5), normal(9)
    expected = [
        [sum(x[t, i] * weight[o, i] for i in range(5)) + bias * beta[o] for o in range(9)] for t in range(TOKENS)
    ]
    np.testing.assert_allclose(run(Linear(bias), [x], [weight, beta][: 1 + bias]), expected, rtol=1e-12)


@pytest.mark.parametrize(("turned", "factor"), [(4, 1.0), (2, 1.3)])
def test_rope_turns_pairs_in_the_complex_plane(turned, factor):
    heads, head_dim, first = 3, 8, 11
    frequencies = tuple(0.7**i for i in range(turned))
    x = normal(TOKENS, heads * head_dim)
    out = run(Rope(heads, head_dim, frequencies, factor), [x], first=first)
    for t in range(TOKENS):
        for h in range(heads):
            before, after = (a[t, h * head_dim : (h + 1) * head_dim] for a in (x, out))
            for i, frequency in enumerate(frequencies):
                expected = complex(before[i], before[i + turned]) * factor * cmath.exp(1j * (first + t) * frequency)
                assert complex(after[i], after[i + turned]) == pytest.approx(expected, rel=1e-12)
            np.testing.assert_array_equal(after[2 * turned :], before[2 * turned :])


def plain_attention(op, q, k, v, seen):
    """One query, one head at a time."""
    out = np.zeros((len(q), op.heads * op.head_dim))
    for t in range(len(q)):
        for head in range(op.heads):
            mine = slice(head * op.head_dim, (head + 1) * op.head_dim)
            shared = head // (op.heads // op.kv_heads)
            theirs = slice(shared * op.head_dim, (shared + 1) * op.head_dim)
            keys = [j for j in range(len(q)) if seen(t, j)]
            scores = [op.scale * float(q[t, mine] @ k[j, theirs]) for j in keys]
            if op.softcap:
                scores = [op.softcap * math.tanh(s / op.softcap) for s in scores]
            total = sum(math.exp(s) for s in scores)
            out[t, mine] = sum(math.exp(s) / total * v[j, theirs] for s, j in zip(scores, keys, strict=True))
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("extra", "seen"),
    [
        ({}, lambda i, j: j <= i),
        ({"window": 3}, lambda i, j: i - 3 < j <= i),
        ({"causal": False}, lambda i, j: True),
        ({"softcap": 0.9}, lambda i, j: j <= i),
    ],
    ids=["causal", "window", "both ways", "softcap"],
)
def test_attention(kv_heads, extra, seen):
    op = Attention(heads=6, kv_heads=kv_heads, head_dim=4, scale=0.8, layer=0, **extra)
    q, k, v = normal(TOKENS, 24), normal(TOKENS, 4 * kv_heads), normal(TOKENS, 4 * kv_heads)
    np.testing.assert_allclose(run(op, [q, k, v]), plain_attention(op, q, k, v, seen), rtol=1e-12)


def test_elementwise_embedding_and_rows():
    x, y, table = normal(TOKENS, 5), normal(TOKENS, 5), normal(11, 5)
    tokens = np.array([3, 0, 10, 3, 1, 2, 9])
    rows = np.array([6, 0, 6])
    silu = np.vectorize(lambda a: a / (1 + math.exp(-a)))
    np.testing.assert_array_equal(run(Add(), [x, y]), x + y)
    np.testing.assert_array_equal(run(Multiply(0.3), [x]), x * 0.3)
    np.testing.assert_array_equal(run(Multiply(), [x, y]), x * y)
    np.testing.assert_allclose(run(Activation("silu"), [x]), silu(x), rtol=1e-13)
    np.testing.assert_allclose(run(Gate("silu"), [x, y]), silu(x) * y, rtol=1e-13)
    np.testing.assert_allclose(
        run(Softcap(2.5), [x]), [[2.5 * math.tanh(a / 2.5) for a in row] for row in x], rtol=1e-13
    )
    np.testing.assert_array_equal(run(SelectRows(), [x], rows=rows), [x[6], x[0], x[6]])
    np.testing.assert_array_equal(run(SelectRows(), [x]), x)
    np.testing.assert_array_equal(run(Embed(1.5), [tokens], [table]), [1.5 * table[t] for t in tokens])


NORM = Norm(eps=1e-5)
HEADS = {"attention": Attention(4, 2, 3, 0.6, 0)}
EVERY_OP = [
    (Embed(2.0), [(TOKENS,)], [(11, 12)]),
    (NORM, [(TOKENS, 12)], [(12,)]),
    (Norm("layer", heads=4, bias=True), [(TOKENS, 12)], [(3,), (3,)]),
    (Linear(True), [(TOKENS, 12)], [(5, 12), (5,)]),
    (Rope(4, 3, (1.0,)), [(TOKENS, 12)], []),
    (Attention(4, 2, 3, 0.6, 0, window=2, softcap=3.0), [(TOKENS, 12), (TOKENS, 6), (TOKENS, 6)], []),
    (Activation("gelu"), [(TOKENS, 12)], []),
    (Gate("gelu_tanh"), [(TOKENS, 12)] * 2, []),
    (Add(), [(TOKENS, 12)] * 2, []),
    (Multiply(), [(TOKENS, 12)] * 2, []),
    (Multiply(0.5), [(TOKENS, 12)], []),
    (Softcap(3.0), [(TOKENS, 12)], []),
    (SelectRows(), [(TOKENS, 12)], []),
    (FusedLinear(NORM, (True, False)), [(TOKENS, 12)], [(12,), (8, 12), (8,), (4, 12)]),
    (FusedLinear(None, (False, False), gate="silu"), [(TOKENS, 12)], [(8, 12), (8, 12)]),
    (FusedLinear(NORM, (True,), residual=True), [(TOKENS, 12), (TOKENS, 8)], [(12,), (8, 12), (8,)]),
    (
        FusedAttention(**HEADS, q_norm=Norm(heads=4), k_norm=Norm(heads=2), rope=Rope(4, 3, (1.0,))),
        [(TOKENS, 12), (TOKENS, 6), (TOKENS, 6)],
        [(3,), (3,)],
    ),
    (FusedNorm(NORM), [(TOKENS, 12)] * 2, [(12,)]),
]


@pytest.mark.parametrize(("op", "inputs", "weights"), EVERY_OP, ids=lambda v: type(v).__name__)
def test_formula_keeps_to_the_standard_and_to_its_shape_rule(op, inputs, weights):
    """array-api-strict has nothing beyond the standard, and refuses what the standard leaves open."""
    values = [RNG.integers(0, 11, s) if isinstance(op, Embed) else normal(*s) for s in inputs]
    arrays = [normal(*s) for s in weights]
    rows = np.array([2, 0])
    expected = op.formula(tuple(values), tuple(arrays), Span(np.arange(TOKENS), rows))
    strict = array_api_strict.asarray
    span = Span(strict(np.arange(TOKENS)), strict(rows))
    found = op.formula(tuple(strict(v) for v in values), tuple(strict(a) for a in arrays), span)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-13, atol=1e-15)
    widths = op.widths(tuple(s[-1] for s in inputs), tuple(weights))
    assert widths == tuple(e.shape[-1] for e in expected)


def test_fused_formulas_are_the_composition_of_their_parts():
    x, r = normal(TOKENS, 12), normal(TOKENS, 8)
    scale, w, b, u = normal(12), normal(8, 12), normal(8), normal(8, 12)
    normed = run(NORM, [x], [scale])
    one, other = run(Linear(True), [normed], [w, b]), run(Linear(), [normed], [u])
    parts = FusedLinear(NORM, (True, False)).formula((x,), (scale, w, b, u), Span(np.arange(TOKENS)))
    np.testing.assert_array_equal(parts[0], one)
    np.testing.assert_array_equal(parts[1], other)
    gated = run(FusedLinear(NORM, (True, False), gate="relu"), [x], [scale, w, b, u])
    np.testing.assert_array_equal(gated, run(Gate("relu"), [one, other]))
    np.testing.assert_array_equal(run(FusedLinear(NORM, (False,), residual=True), [x, r], [scale, u]), other + r)
    np.testing.assert_array_equal(run(FusedNorm(NORM), [x, w[:1] * 0 + 1.0], [scale]), normed + 1.0)


def test_fused_attention_norms_then_turns_queries_and_keys_each_with_their_own_weights():
    q, k, v, qw, kw = normal(TOKENS, 12), normal(TOKENS, 6), normal(TOKENS, 6), normal(3), normal(3)
    fused = FusedAttention(**HEADS, q_norm=Norm(heads=4), k_norm=Norm(heads=2), rope=Rope(4, 3, (0.4,)))
    turned_q = run(Rope(4, 3, (0.4,)), [run(Norm(heads=4), [q], [qw])])
    turned_k = run(Rope(2, 3, (0.4,)), [run(Norm(heads=2), [k], [kw])])
    np.testing.assert_array_equal(run(fused, [q, k, v], [qw, kw]), run(HEADS["attention"], [turned_q, turned_k, v]))


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "message"),
    [
        (Norm(heads=5), (12,), ((2,),), "width modulo heads: 2, must be 0"),
        (Norm(), (12,), ((10,),), r"norm's weight shapes: \(\(10,\),\), must be \(\(12,\),\)"),
        (Linear(), (12,), ((5, 10),), r"linear's weight shapes: \(\(5, 10\),\), must be \(\(5, 12\),\)"),
        (Linear(True), (12,), ((5, 12),), "linear's weight shapes"),
        (Rope(2, 5, (1.0,)), (12,), (), r"rope's input width: \(12,\), must be \(10,\)"),
        (Rope(2, 6, (1.0,) * 4), (12,), (), "rope turns 8 of 6 features of a head"),
        (Attention(3, 2, 4, 1.0, 0), (12, 8, 8), (), "query heads modulo key heads: 1, must be 0"),
        (Attention(4, 2, 3, 1.0, 0), (12, 6, 12), (), "attention's input widths"),
        (Add(), (12, 8), (), "widths of an elementwise op's inputs"),
        (FusedLinear(None, (False, False), gate="silu"), (4,), ((8, 4), (9, 4)), "widths of an elementwise"),
        (FusedNorm(NORM), (4, 5), ((4,),), "widths of an elementwise"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(op, inputs, weights, message):
    with pytest.raises(ConfigError, match=message):
        op.widths(inputs, weights)


def test_input_hands_in_what_the_span_holds():
    hidden = normal(TOKENS, 3)
    assert Input(3).formula((), (), Span(np.arange(TOKENS), hidden=hidden))[0] is hidden
    assert Input(3).widths((), ()) == (3,)
