"""Sums of outer products of every instruction set against float64, and the edges of their shapes."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import _native
from hasten.compress.moments import CHUNKS, TOKENS, Moments

isas = pytest.mark.parametrize("isa", _native.available_isas())


def features(tokens: int, width: int) -> np.ndarray:
    """Correlated, of sizes from thousandths to thousands; one never fires."""
    rng = np.random.default_rng(tokens + width)
    x = rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width))
    x *= 10 ** rng.uniform(-3, 3, width)
    x[:, width // 2] = 0
    return x.astype(np.float32)


@isas
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (256, 16), (255, 17), (37, 63), (256, 150)])
def test_packed_and_added_they_are_the_outer_products(isa: str, tokens: int, width: int) -> None:
    x, panels = features(tokens, width), -(-width // 16)
    squares, magnitudes, peaks = np.empty(width), np.empty(width, np.float32), np.empty(width, np.float32)
    codes, scales = np.empty((panels, 1, TOKENS, 16), np.int16), np.empty((1, panels * 16), np.float32)
    _native.outer_pack(isa, x, squares, magnitudes, peaks, codes, scales, 0)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(squares, (exact**2).sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(magnitudes, np.abs(exact).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(peaks, np.abs(x).max(axis=0))
    steps = codes.reshape(panels, TOKENS // 2, 16, 2).transpose(1, 3, 0, 2).reshape(TOKENS, -1)[:tokens, :width]
    assert (np.abs(steps * scales[0, :width] - x) <= 0.51 * peaks / 2895).all()

    into = np.ones((width, width), np.float32)
    for first in range(0, panels, 3):
        _native.outer_add(isa, codes, scales, into, first, min(first + 3, panels))
    whole = steps.astype(np.int64)  # products of whole numbers are exact
    expected = 1 + (whole.T @ whole) * np.outer(scales[0, :width], scales[0, :width]).astype(np.float64)
    size = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    np.testing.assert_allclose(np.triu(into / size), np.triu(expected / size), atol=1e-6)


@isas
def test_the_largest_sums_do_not_overflow(isa: str) -> None:
    x = np.full((TOKENS, 16), -3.0, np.float32)
    codes, scales = np.empty((1, 1, TOKENS, 16), np.int16), np.empty((1, 16), np.float32)
    _native.outer_pack(isa, x, np.empty(16), *np.empty((2, 16), np.float32), codes, scales, 0)
    into = np.zeros((16, 16), np.float32)
    _native.outer_add(isa, codes, scales, into, 0, 1)
    np.testing.assert_allclose(into, 9.0 * TOKENS, rtol=1e-6)


@pytest.mark.parametrize("cut", [(1,), (256,), (300, 5, 700), (CHUNKS * TOKENS + 1, 40)])
def test_moments_do_not_hang_on_how_tokens_come(cut: tuple[int, ...]) -> None:
    parts = [features(n, 90) for n in cut]
    sums = Moments(90, second=True)
    for x in parts:
        sums.add(x)
    sums.settle()
    x = np.concatenate(parts).astype(np.float64)
    second, size = sums.second(), np.sqrt((x**2).mean(axis=0)) + 1e-30
    assert second is not None
    np.testing.assert_array_equal(second, second.T)
    np.testing.assert_allclose(second / np.outer(size, size), x.T @ x / len(x) / np.outer(size, size), atol=2e-3)
    np.testing.assert_allclose(sums.squares, (x**2).sum(axis=0), rtol=1e-6)
    assert sums.tokens == len(x)
    alone = Moments(90, second=False)
    for part in parts:
        alone.add(part)
    np.testing.assert_allclose(alone.squares, sums.squares, rtol=1e-6)
    assert alone.second() is None


def test_a_token_that_sticks_out_costs_no_more_than_damping() -> None:
    """Its peak sets the steps of the 256 around it."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4096, 96)) @ rng.normal(size=(96, 96)) / 10).astype(np.float32)
    x[::256] *= 1000
    sums = Moments(96, second=True)
    sums.add(x)
    sums.settle()
    made, exact = sums.second(), x.astype(np.float64).T @ x / len(x)
    assert made is not None
    damped = [h + 0.01 * np.trace(exact) / 96 * np.eye(96) for h in (made.astype(np.float64), exact)]
    target = exact @ rng.normal(size=96)
    loss = [float(np.linalg.solve(h, target) @ exact @ np.linalg.solve(h, target)) for h in damped]
    assert loss[0] == pytest.approx(loss[1], rel=5e-3)


def test_shapes_that_do_not_go_together_are_refused() -> None:
    x, one = np.ones((4, 20), np.float32), np.ones(20, np.float32)
    codes, scales = np.ones((2, 1, TOKENS, 16), np.int16), np.ones((1, 32), np.float32)
    for wrong in ((codes[:1], scales, 0), (codes, scales[:, :16], 0), (codes, scales, 1), (None, scales, 0)):
        with pytest.raises(ValueError, match="do not go together"):
            _native.outer_pack("", x, np.ones(20), one, one, *wrong)
    with pytest.raises(ValueError, match="do not go together"):
        _native.outer_pack("", np.ones((300, 20), np.float32), np.ones(20), one, one, None, None, 0)
    with pytest.raises(ValueError, match="do not go together"):
        _native.outer_pack("", np.ones((4, 0), np.float32), np.ones(0), one[:0], one[:0], codes[:0], scales[:, :0], 0)
    for into, last in ((np.ones((20, 20), np.float32), 3), (np.ones((50, 50), np.float32), 1)):
        with pytest.raises(ValueError, match="do not go together"):
            _native.outer_add("", codes, scales, into, 0, last)
