"""Methods against independent statements of what their papers say, in float64 and as slowly as it takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hasten import formats
from hasten.compress import methods
from hasten.compress.methods import Inputs, _sweep, clip, gptq, hqq, logarithmic
from hasten.formats.codebook import DEFAULTS


def correlated(rows: int, columns: int, tokens: int = 500, seed: int = 0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) * (rng.uniform(size=(columns, columns)) < 0.2) + np.eye(columns)
    inputs = rng.normal(size=(tokens, columns)) @ mix * np.exp(rng.normal(size=columns) / 2)
    values = (rng.standard_t(4, (rows, columns)) / columns**0.5).astype(np.float32)
    return values, inputs


def surgeon(values, hessian, order, level):
    """Optimal brain quantisation in a given order (Frantar and Alistarh 2022, arXiv:2208.11580, eq. 2 and 3).

    After each column the inverse Hessian of those left is made anew.
    """
    left, row = list(order), values.astype(np.float64).copy()
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        j = left[0]
        rounded = level(j, row[j])
        row[left] -= (row[j] - rounded) / inverse[0, 0] * inverse[:, 0]
        row[j] = rounded
        left.pop(0)
    return row


@pytest.mark.parametrize("columns", [40, 150])
@pytest.mark.parametrize("bits", ["int4", "int3"])
def test_the_sweep_is_optimal_brain_quantisation(columns: int, bits: str) -> None:
    values, inputs = correlated(3, columns)
    hessian = inputs.T @ inputs / len(inputs)
    damped = hessian + 0.01 * hessian.trace() / columns * np.eye(columns)
    order = np.argsort(-np.diagonal(hessian))
    scales = clip.best(values, bits, 32, None)
    low, high = clip.LEVELS[bits]
    grid = _sweep.Grid(scales, order // 32, clip.rounding(bits))
    made, error = _sweep.sweep(values[:, order], _sweep.factor(hessian, order), grid)
    made = made[:, np.argsort(order)]
    for row in range(3):

        def level(j: int, value: float, row: int = row) -> float:
            scale = float(scales[row, j // 32])
            return float(np.clip(np.rint(value / scale), low, high)) * scale

        expected = surgeon(values[row], damped, order, level)
        np.testing.assert_allclose(made[row], expected, rtol=1e-6)
        off = values[row].astype(np.float64) - expected
        np.testing.assert_allclose(error[row], off @ damped @ off, rtol=1e-4)


def test_the_factor() -> None:
    _, inputs = correlated(1, 200)
    hessian = inputs.T @ inputs / len(inputs)
    order = np.random.default_rng(1).permutation(200)
    found = _sweep.factor(hessian, order, damping=0.05)
    upper = found.ahead.astype(np.float64) * found.diagonal
    damped = (hessian + 0.05 * hessian.trace() / 200 * np.eye(200))[np.ix_(order, order)]
    np.testing.assert_allclose(upper @ upper.T, damped, rtol=1e-4, atol=1e-6)
    assert not np.tril(upper, -1).any()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_the_factor_is_cholesky_s(size: int) -> None:
    """Of strongly correlated inputs of unequal sizes, damped as usual, against LAPACK in float64."""
    rng = np.random.default_rng(size)
    inputs = rng.normal(size=(size + 50, size)) * np.exp(rng.normal(size=size))
    inputs += rng.normal(size=(size + 50, 3)) @ rng.normal(size=(3, size)) * 5
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    hessian[np.arange(size), np.arange(size)] += np.float32(0.01 * hessian.trace() / size)
    exact = np.linalg.cholesky(hessian[::-1, ::-1].astype(np.float64))[::-1, ::-1]
    found = hessian.copy()
    _sweep.triangular(found)
    np.testing.assert_allclose(np.diagonal(found), np.diagonal(exact), rtol=1e-4)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * np.diagonal(exact).max())
    assert np.linalg.norm(found.astype(np.float64) @ found.T - hessian) < 1e-6 * np.linalg.norm(hessian)
    assert not np.tril(found, -1).any()


@pytest.mark.parametrize("at", [0, 200, 299])
def test_what_is_not_positive_definite_has_no_factor(at: int) -> None:
    matrix = np.eye(300, dtype=np.float32)
    matrix[at, at] = -1
    with pytest.raises(np.linalg.LinAlgError):
        _sweep.triangular(matrix)


def test_refitted_scales_are_those_of_least_squares() -> None:
    """Against numpy.linalg.lstsq on the raw inputs: the output as a sum over groups of scale times levels' output."""
    values, inputs = correlated(4, 70)
    levels = np.clip(np.rint(values / np.abs(values).max() * 7), -8, 7).astype(np.float32)
    scales = np.full((4, 3), np.abs(values).max() / 7, np.float32)
    made = levels * scales.repeat(32, axis=1)[:, :70]
    hessian = inputs.T @ inputs / len(inputs)
    found = gptq.refit(values @ hessian, made, scales, 32, hessian)
    for row in range(4):
        parts = [inputs[:, g : g + 32] @ levels[row, g : g + 32].astype(np.float64) for g in (0, 32, 64)]
        expected, *_ = np.linalg.lstsq(np.stack(parts, axis=1), inputs @ values[row].astype(np.float64), rcond=None)
        np.testing.assert_allclose(found[row], expected, rtol=2e-3)  # f16


def test_sparsegpt_prunes_and_repairs_as_its_algorithm_says() -> None:
    """Algorithm 1 of arXiv:2301.00774 with blocks of 16 rows by 32 columns, each column's inverse made anew."""
    values, inputs = correlated(16, 96)
    moments, hessian = (inputs**2).mean(axis=0), inputs.T @ inputs / len(inputs)
    format = formats.get("sparse8-g32")
    found = methods.apply("sparsegpt", values, format, Inputs(moments, hessian=hessian))
    scales = clip.best(methods.apply("wanda", values, format, Inputs(moments)).dense(), "int8", 32, moments)
    damped = hessian + 0.01 * hessian.trace() / 96 * np.eye(96)
    rows = values.astype(np.float64).copy()
    for j in range(96):
        if j % 32 == 0:
            diagonal = [np.linalg.inv(damped[k:, k:])[0, 0] for k in range(j, j + 32)]
            scores = rows[:, j : j + 32] ** 2 / np.array(diagonal)
            mask = scores > np.sort(scores, axis=None)[255]
        inverse = np.linalg.inv(damped[j:, j:])
        rounded = np.clip(np.rint(rows[:, j] / scales[:, j // 32]), -127, 127) * scales[:, j // 32] * mask[:, j % 32]
        rows[:, j:] -= np.outer((rows[:, j] - rounded) / inverse[0, 0], inverse[0])
        rows[:, j] = rounded
    np.testing.assert_allclose(found.dense(), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "taylor"])
def test_which_half_is_pruned(method: str) -> None:
    values, inputs = correlated(32, 64)
    gradients = np.random.default_rng(3).exponential(size=values.shape) ** 2
    known = Inputs((inputs**2).mean(axis=0), gradients=gradients)
    norms = np.linalg.norm(inputs, axis=0)  # of each feature over the text, as Wanda has it
    scores = {"magnitude": np.abs(values), "wanda": np.abs(values) * norms, "taylor": values**2 * gradients}[method]
    found = methods.apply(method, values, formats.get("sparse8-g32"), known).dense()
    for i in range(0, 32, 16):
        for j in range(0, 64, 32):
            block = scores[i : i + 16, j : j + 32]
            kept = block > np.sort(block, axis=None)[255]
            assert not found[i : i + 16, j : j + 32][~kept].any()
            small = np.abs(values[i : i + 16, j : j + 32]) < 0.006 * np.abs(values).max()  # may round to zero
            assert (found[i : i + 16, j : j + 32][kept & ~small] != 0).all()


@pytest.mark.parametrize("name", ["int4-g64", "int3-g32", "int2-g128"])
def test_hqq_leaves_less_of_its_norm_than_nearest_and_than_least_squares(name: str) -> None:
    """On heavy tails: sum |w - q|^0.7, what it is to minimise; without looking at inputs."""
    values = np.random.default_rng(0).standard_t(3, (64, 256)).astype(np.float32)
    errors = {}
    for method in ("hqq", "nearest", "clip"):
        difference = np.abs(values - methods.apply(method, values, formats.get(name)).dense())
        errors[method] = float((difference.astype(np.float64) ** 0.7).sum())
    assert errors["hqq"] < 0.99 * errors["nearest"]
    assert errors["hqq"] < errors["clip"]


def test_the_soft_threshold_is_the_minimum() -> None:
    """Of |e|^p + beta/2 (e - x)^2, near enough: no value on a fine grid is much better."""
    grid = np.linspace(-4, 4, 16001)
    for x in (-3.0, -0.7, 0.05, 0.9, 2.5):
        for beta in (1.0, 10.0):
            cost = np.abs(grid) ** hqq.P + beta / 2 * (grid - x) ** 2
            found = float(hqq.shrink(np.float32(x), np.float32(beta)))
            own = abs(found) ** hqq.P + beta / 2 * (found - x) ** 2
            assert own <= cost.min() * 1.35 + 1e-3


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("method", ["nf4", "logarithmic"])
def test_fixed_grids(method: str, bits: int) -> None:
    grid = logarithmic.grid(bits) if method == "logarithmic" else DEFAULTS[bits]
    values, inputs = correlated(16, 64)
    known = Inputs((inputs**2).mean(axis=0))
    format = formats.get(f"codebook{bits}-g32")
    weight = methods.apply(method, values, format, known)
    assert set((weight.arrays["codebook"].astype(int) - 64).tolist()) == set(grid.tolist())
    plain = format.pack(values, codebook=grid)  # each group's extreme is a level
    errors = [float(((values - w.dense()) ** 2 @ known.moments).sum()) for w in (weight, plain)]
    assert errors[0] < 0.95 * errors[1]
    if method == "logarithmic":
        sizes = np.unique(np.abs(grid.astype(float)))
        assert sizes[-1] == 63
        assert all(abs(b / a - (2**0.5 if bits == 4 else 2)) < 0.15 for a, b in itertools.pairwise(sizes))
