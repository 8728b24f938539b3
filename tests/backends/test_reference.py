"""The reference backend: its arguments, other namespaces, and transformers' loss and gradients."""

import array_api_strict
import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import reference

IDS = np.array([4, 1, 49, 7, 0, 7])


@pytest.fixture(scope="module")
def graph():
    return tiny_graph(bias=True, head_norms=True, post_norms=True)


@pytest.fixture(scope="module")
def weights(graph):
    return random_arrays(graph)


def test_a_token_sees_only_what_stands_before_it(graph, weights):
    whole = reference.forward(graph, weights, IDS)
    for length in range(1, len(IDS)):
        np.testing.assert_allclose(reference.forward(graph, weights, IDS[:length]), whole[:length], rtol=1e-11)
    assert np.abs(np.diff(whole[[3, 5]], axis=0)).max() > 0.01  # the same token elsewhere


def test_rows_keep_and_upto(graph, weights):
    whole = reference.values(graph, weights, IDS)
    rows = np.array([5, 2])
    np.testing.assert_allclose(reference.forward(graph, weights, IDS, rows=rows), whole["logits"][rows], rtol=1e-12)
    kept = reference.values(graph, weights, IDS, keep=["blocks.0.v"], upto="blocks.0.v")
    assert list(kept) == ["blocks.0.v"]
    np.testing.assert_array_equal(kept["blocks.0.v"], whole["blocks.0.v"])
    assert "blocks.0.attention" not in reference.values(graph, weights, IDS, upto="blocks.0.v")


def test_a_batch_of_sequences_is_each_sequence_alone(graph, weights):
    batch = np.stack([IDS, IDS[::-1]])
    logits = reference.forward(graph, weights, batch)
    for ids, found in zip(batch, logits, strict=True):
        np.testing.assert_allclose(found, reference.forward(graph, weights, ids), rtol=1e-11)


def test_a_namespace_with_nothing_beyond_the_standard(graph, weights):
    strict = {name: array_api_strict.asarray(value) for name, value in weights.items()}
    logits = reference.forward(graph, strict, array_api_strict.asarray(IDS))
    np.testing.assert_allclose(np.asarray(logits), reference.forward(graph, weights, IDS), rtol=1e-11)


def test_float32_stays_float32(graph, weights):
    single = {name: value.astype(np.float32) for name, value in weights.items()}
    logits = reference.forward(graph, single, IDS)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference.forward(graph, weights, IDS), rtol=2e-4, atol=2e-5)


def test_dense_weights_are_what_a_format_stores():
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    packed = formats.base.get("int4-g32").pack(values)
    dense = reference.dense_weights({"w": packed, "n": values[0]})
    assert dense["w"].dtype == dense["n"].dtype == np.float64
    np.testing.assert_array_equal(dense["w"], packed.dense())
    np.testing.assert_array_equal(dense["n"], values[0])


def test_gradients_are_those_of_finite_differences(graph, weights):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.asarray(value).requires_grad_() for name, value in weights.items()}
    mix = torch.asarray(np.random.default_rng(1).normal(size=(len(IDS), 50)))
    (reference.forward(graph, tensors, torch.asarray(IDS)) * mix).sum().backward()
    for name in (
        "blocks.0.q.weight",
        "blocks.0.k_norm.weight",
        "blocks.1.up.weight",
        "embed.weight",
        "blocks.0.k.bias",
    ):
        step = np.random.default_rng(2).normal(size=weights[name].shape)
        sides = [
            (reference.forward(graph, {**weights, name: weights[name] + e * step}, IDS) * mix.numpy()).sum()
            for e in (1e-5, -1e-5)
        ]
        along = (tensors[name].grad.numpy() * step).sum()
        assert along == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)
