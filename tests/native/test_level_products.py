"""The normal equations of a row's scales and their solution, of every instruction set, against float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import _native

isas = pytest.mark.parametrize("isa", _native.available_isas())


def some(columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels [columns, rows] and a covariance of features [columns, columns]."""
    rng = np.random.default_rng(columns + rows)
    inputs = rng.normal(size=(2 * columns, columns)).astype(np.float32)
    return rng.integers(-8, 8, (columns, rows)).astype(np.float32), inputs.T @ inputs / len(inputs)


def defined(levels: np.ndarray, hessian: np.ndarray, group: int) -> np.ndarray:
    parts = levels.T.astype(np.float64).reshape(levels.shape[1], -1, group)
    blocks = hessian.astype(np.float64).reshape(len(levels) // group, group, -1, group)
    return np.einsum("rgc,gchd,rhd->rgh", parts, blocks, parts, optimize=True)


@isas
@pytest.mark.parametrize(
    ("columns", "group", "rows"), [(8, 8, 1), (32, 32, 16), (96, 32, 17), (128, 64, 33), (256, 128, 40), (24, 8, 15)]
)
def test_they_are_their_formula(isa: str, columns: int, group: int, rows: int) -> None:
    levels, hessian = some(columns, rows)
    expected = defined(levels, hessian, group)
    found = _native.level_products(isa, levels, hessian, group)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@isas
def test_a_row_does_not_depend_on_its_company(isa: str) -> None:
    levels, hessian = some(64, 37)
    together = _native.level_products(isa, levels, hessian, 32)
    for rows in (slice(0, 16), slice(5, 6), slice(20, 37)):
        alone = _native.level_products(isa, np.ascontiguousarray(levels[:, rows]), hessian, 32)
        np.testing.assert_array_equal(alone, together[rows])


@isas
def test_shapes_that_do_not_go_together_are_refused(isa: str) -> None:
    levels, hessian = some(64, 3)
    for wrong, group in ((hessian[:63, :63], 32), (hessian, 48), (hessian, 4), (hessian, 0)):
        with pytest.raises(ValueError, match="do not go together"):
            _native.level_products(isa, levels, np.ascontiguousarray(wrong), group)


@isas
@pytest.mark.parametrize("size", [1, 2, 5, 28, 63])
def test_a_system_is_solved(isa: str, size: int) -> None:
    rng = np.random.default_rng(size)
    inputs = rng.normal(size=(3, size + 2, size)).astype(np.float32)
    matrices, right = np.einsum("rkg,rkh->rgh", inputs, inputs), rng.normal(size=(3, size)).astype(np.float32)
    expected = np.linalg.solve(matrices.astype(np.float64), right[:, :, None].astype(np.float64))[:, :, 0]
    np.testing.assert_allclose(_native.solve_positive(isa, matrices, right), expected, rtol=1e-8)


@isas
@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_matrix_that_is_not_positive_definite_has_no_solution(isa: str, at: int) -> None:
    matrices, right = np.eye(7, dtype=np.float32)[None].repeat(2, axis=0), np.ones((2, 7), np.float32)
    matrices[1, at, at] = -1
    found = _native.solve_positive(isa, matrices, right)
    np.testing.assert_array_equal(found[0], right[0])
    assert np.isnan(found[1]).all()
    with pytest.raises(ValueError, match="do not go together"):
        _native.solve_positive(isa, matrices, right[:1])
