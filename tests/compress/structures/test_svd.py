"""Low rank against the decomposition that numpy makes of W L, and against the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
from correlated import error, hessian, layer
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import reference
from hasten.compress.structures import svd
from hasten.errors import InputError
from hasten.graph.structure import LowRank, restructured

SHAPES = [(24, 40), (40, 24), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_output_error_is_the_optimum(shape: tuple[int, int], rank: int) -> None:
    """Eckart and Young: what the singular values of W L beyond the rank add up to; L is Cholesky's here."""
    values, inputs = layer(*shape, tokens=300)
    moments = hessian(inputs)
    optimum = np.linalg.svd(values @ np.linalg.cholesky(moments), compute_uv=False)[rank:]
    left, right = svd.factors(values, moments, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    np.testing.assert_allclose(error(values - left @ right, inputs), np.sum(optimum**2), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_svd_llms(shape: tuple[int, int]) -> None:
    """Its algorithm as it is written: decompose W S, cut, and divide by S."""
    values, inputs = layer(*shape, tokens=300)
    root = np.linalg.cholesky(hessian(inputs))
    u, s, vt = np.linalg.svd(values @ root, full_matrices=False)
    expected = (u[:, :7] * s[:7]) @ vt[:7] @ np.linalg.inv(root)
    left, right = svd.factors(values, hessian(inputs), 7)
    np.testing.assert_allclose(left @ right, expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_moments(shape: tuple[int, int]) -> None:
    """Fewer tokens than features, and features that never fire: still the optimum, over the tokens there were."""
    values, inputs = layer(*shape, tokens=12)
    inputs[:, ::5] = 0
    optimum = np.linalg.svd(values @ inputs.T / 12**0.5, compute_uv=False)[6:]
    left, right = svd.factors(values, hessian(inputs), 6)
    np.testing.assert_allclose(error(values - left @ right, inputs), np.sum(optimum**2), rtol=1e-4)
    left, right = svd.factors(values, np.zeros((shape[1], shape[1])), 6)
    assert np.isfinite(left @ right).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_without_moments_it_is_the_matrixs_own(shape: tuple[int, int]) -> None:
    values, _ = layer(*shape, tokens=1)
    u, s, vt = np.linalg.svd(values, full_matrices=False)
    left, right = svd.factors(values, None, 9)
    np.testing.assert_allclose(left @ right, (u[:, :9] * s[:9]) @ vt[:9], atol=1e-5)
    np.testing.assert_allclose(svd.energies(values, None), s**2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_is_better_on_other_inputs(shape: tuple[int, int]) -> None:
    values, inputs = layer(*shape, tokens=3000)
    whitened, plain = (svd.factors(values, h, 8) for h in (hessian(inputs[:1000]), None))
    errors = [error(values - left @ right, inputs[1000:]) for left, right in (whitened, plain)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("name", ["int4-g32", "int2-g32"])
def test_what_quantisation_took_away_is_fitted(name: str) -> None:
    values, inputs = layer(48, 64, tokens=3000)
    graph = tiny_graph()
    quantised = formats.get(name).pack(values).dense()
    moments = hessian(inputs[:1000])
    amount = {"w": LowRank(8, True)}
    _, new = svd.restructure(graph, {"w": values}.__getitem__, {"w": moments}, amount, {"w": quantised})
    correction = new["w.left"] @ new["w.right"]
    optimum = np.linalg.svd((values - quantised) @ np.linalg.cholesky(moments), compute_uv=False)[8:]
    np.testing.assert_allclose(error(values - quantised - correction, inputs[:1000]), np.sum(optimum**2), rtol=1e-4)
    left, right = svd.factors(values - quantised, None, 8)
    without, plain, found = (
        error(values - quantised - c, inputs[1000:]) for c in (0 * correction, left @ right, correction)
    )
    assert found < 0.9 * plain < 0.9 * without


def test_a_restructured_graph_and_its_weights_fit() -> None:
    graph = tiny_graph(bias=True)
    arrays = {name: a.astype(np.float32) for name, a in random_arrays(graph).items()}
    amount = {"blocks.0.q.weight": LowRank(24), "blocks.1.down.weight": LowRank(24)}
    structure, new = svd.restructure(graph, arrays.__getitem__, {}, amount)
    made = restructured(graph, structure)
    weights = {name: new.get(name, arrays.get(name)) for name in made.weights}
    ids = np.arange(9)  # at full rank nothing is lost
    expected = reference.forward(graph, arrays, ids)
    np.testing.assert_allclose(reference.forward(made, weights, ids), expected, atol=1e-4)
    again = svd.restructure(graph, arrays.__getitem__, {}, amount)[1]
    assert all(np.array_equal(new[name], again[name]) for name in new)


def test_ranks_by_energy_and_by_share() -> None:
    energy = np.array([50.0, 30, 15, 4, 1])
    assert [svd.rank_by_energy(energy, share) for share in (0.5, 0.51, 0.8, 0.99, 1.0)] == [1, 2, 2, 4, 5]
    assert svd.rank_by_energy(np.zeros(4), 0.9) == 1
    assert svd.rank_by_energy(np.ones(100), 0.5) == 48
    shapes = {"a": (10, 10), "b": (10, 10)}
    spectra = {"a": np.array([100.0, 1, 1, 1, 1]), "b": np.array([9.0, 8, 7, 6, 5])}
    found = svd.ranks_by_share(spectra, shapes, 0.5)
    assert found == {"a": 1, "b": 4}  # 5 ranks of 20 numbers each; the second of a is worth less than any of b
    assert svd.break_even((10, 10)) == 4
    assert svd.break_even((896, 4864)) == 756


def test_moments_that_are_none_are_refused() -> None:
    values, _ = layer(8, 12, tokens=50)
    for moments, message in (
        (np.full((12, 12), np.inf), "hold a NaN or an infinity"),
        (np.eye(8), r"are \[8, 8\], must be \[12, 12\]"),
        (-np.eye(12), "negative"),
    ):
        with pytest.raises(InputError, match=message):
            svd.restructure(tiny_graph(), {"w": values}.__getitem__, {"w": moments}, {"w": LowRank(2)})
