"""Elementary functions against the standard library's and direct statements."""

import math

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.graph.functions import activate, erf, sigmoid, softmax

GRID = np.concatenate([np.linspace(-8.0, 8.0, 4001), [-40.0, -1e-9, 1e-300, 1.999999999, 2.0, 40.0]])


def test_erf_is_within_one_in_10_to_the_15_of_the_library():
    truth = np.array([math.erf(x) for x in GRID])
    assert np.abs(erf(GRID) - truth).max() <= 1e-15
    small = np.abs(GRID) < 2
    np.testing.assert_allclose(erf(GRID)[small], truth[small], rtol=2e-15)


def test_erf_of_a_namespace_that_has_one():
    torch = pytest.importorskip("torch")
    truth = np.array([math.erf(x) for x in GRID])
    assert np.abs(erf(torch.asarray(GRID)).numpy() - truth).max() <= 1e-15


@given(st.floats(-700, 700))
def test_sigmoid_keeps_its_relative_accuracy(x):
    truth = 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
    assert sigmoid(np.array([x]))[0] == pytest.approx(truth, rel=1e-15)


def test_sigmoid_neither_overflows_nor_warns():
    np.testing.assert_array_equal(sigmoid(np.array([-1e5, 0.0, 1e5])), [0.0, 0.5, 1.0])


PLAIN = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_activations_equal_their_plain_statements(kind):
    x = np.linspace(-6, 6, 501)
    np.testing.assert_allclose(activate(kind, x), [PLAIN[kind](v) for v in x], rtol=1e-13, atol=2e-15)
    strict = activate(kind, array_api_strict.asarray(x))
    np.testing.assert_allclose(np.asarray(strict), activate(kind, x), rtol=1e-15, atol=1e-16)


def test_softmax_sums_to_one_and_ignores_what_is_masked():
    out = softmax(np.array([[1e4, 1e4 + math.log(3.0), -math.inf], [0.0, -math.inf, -math.inf]]))
    np.testing.assert_allclose(out, [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], rtol=1e-11)
