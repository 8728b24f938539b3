"""One column after another is rounded, and the columns still to come make up for what was lost: GPTQ and SparseGPT.

With H = R R^T, R upper triangular, a row's squared error is |(w - q) R|^2, whose part j knows no q after q[j]. So q[j]
is the level nearest to w[j] + sum_i<j (w[i] - q[i]) R[i, j] / R[j, j], and (that - q[j]) R[j, j] is left of part j.
These are the values that optimal brain quantisation arrives at by way of inverse Hessians (Frantar et al. 2022,
arXiv:2210.17323, eq. 4; Frantar and Alistarh 2023, arXiv:2301.00774), without an inverse: [H^-1][j, j] of the columns
from j on is 1 / R[j, j]^2. Rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.compress.methods._groups import Round, in_threads
from hasten.errors import FormatError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Prune = Callable[[slice, Float32], Float32]
"""(columns, their values as they are now [rows, columns]) -> 0 where one is to become zero, else 1."""
DAMPING = 0.01
BLOCK = 128
FACTOR_BLOCK = 256
HALF_LEVELS = 516
"""Of the table that rounds: quotients from -129 to 129, beyond every format's levels."""
ROWS = 512
"""Rows swept together: a block of columns of them stays in the cache."""


@dataclass(frozen=True)
class Factor:
    """Of a Hessian: `ahead` holds R[i, j] / R[j, j] [in, in], `diagonal` R[j, j] [in]."""

    ahead: Float32
    diagonal: Float32


def factor(hessian: npt.NDArray[Any], order: npt.NDArray[Any], damping: float = DAMPING) -> Factor:
    """Of R upper triangular with H + d I = R R^T, H's rows and columns taken in `order`.

    `damping` is d relative to H's mean diagonal. A Hessian that is singular all the same is damped tenfold until it is
    not; features that are always zero stay alone. The last one is kept: matrices that read the same, and formats of one
    matrix, come one after another. Raises FormatError where damping never ends.
    """
    last = _last.get("factor")
    if last and last[0] is hessian and last[1] == damping and np.array_equal(last[2], order):
        return last[3]
    _last.clear()
    found = _factor(hessian, order, damping)
    _last["factor"] = hessian, damping, order, found
    return found


_last: dict[str, tuple[npt.NDArray[Any], float, npt.NDArray[Any], Factor]] = {}


def _factor(hessian: npt.NDArray[Any], order: npt.NDArray[Any], damping: float) -> Factor:
    given: Float32 = np.asarray(hessian, np.float32)
    columns, mean = len(given), float(given.trace(dtype=np.float64)) / len(given)
    if not np.isfinite(given).all():
        raise FormatError("the second moments of a matrix's inputs are not finite", "calibrate on another text")
    if mean < 0:
        raise FormatError("the second moments of a matrix's inputs are no covariance", "calibrate on another text")
    if mean == 0:
        return Factor(np.eye(columns, dtype=np.float32), np.ones(columns, np.float32))
    diagonal, added = np.arange(columns), 0.0
    for _ in range(6):
        upper: Float32 = np.take(np.take(given, order, axis=0), order, axis=1)
        added += damping * mean
        upper[diagonal, diagonal] += np.float32(added)
        try:
            triangular(upper)
            break
        except np.linalg.LinAlgError:
            damping *= 10
    else:
        raise FormatError("the second moments of a matrix's inputs are no covariance", "calibrate on more text")
    own: Float32 = np.ascontiguousarray(np.diagonal(upper))
    upper /= own
    return Factor(upper, own)


def triangular(matrix: Float32) -> None:
    """A symmetric `matrix` becomes R, upper triangular, with matrix = R R^T: Cholesky's factor from the last column on.

    Blocks of columns take what those behind them have settled in one product, so that nearly all of the work is large
    products in float32; only blocks on the diagonal are factored, in float64. Raises np.linalg.LinAlgError where the
    matrix is not positive definite.
    """
    for start in reversed(range(0, len(matrix), FACTOR_BLOCK)):
        stop = min(start + FACTOR_BLOCK, len(matrix))
        own, above, behind = slice(start, stop), slice(start), slice(stop, None)
        if stop < len(matrix):
            matrix[:stop, own] -= matrix[:stop, behind] @ matrix[own, behind].T
        # With rows and columns reversed a matrix is L L^T, so it is R R^T with R = L reversed.
        square = np.linalg.cholesky(matrix[own, own][::-1, ::-1].astype(np.float64))[::-1, ::-1]
        matrix[above, own] = matrix[above, own] @ np.linalg.inv(square).T.astype(np.float32)
        matrix[own, own], matrix[behind, own] = square, 0


@dataclass(frozen=True)
class Grid:
    """What values may become: `nearest` levels times the scales [out, groups]; `groups` is each column's, in order.

    With `prune` columns go in blocks of `block`, and it says of each what is left of it.
    """

    scales: Float32
    groups: npt.NDArray[Any]
    nearest: Round
    prune: Prune | None = None
    block: int = BLOCK

    def levels(self) -> Float32:
        """The level nearest to a quotient q, at floor(2 q) + HALF_LEVELS / 2: borders lie on no finer grid."""
        middles = (np.arange(HALF_LEVELS, dtype=np.float32) - HALF_LEVELS // 2 + 0.5) / 2
        return self.nearest(middles.astype(np.float32))


def sweep(values: Float32, factor: Factor, grid: Grid) -> tuple[Float32, Float64]:
    """values [out, in], columns in the order of `factor` -> what `grid` made of them, in that order, and rows' errors.

    The error [out] is |(values - made) R|^2: what a row's output is off by, squared, on average; damping included.
    """
    made, error = np.empty_like(values), np.empty(len(values))
    parts = [slice(i, min(i + ROWS, len(values))) for i in range(0, len(values), ROWS)]
    scales, levels = np.ascontiguousarray(grid.scales.T), grid.levels()
    weights = factor.diagonal * factor.diagonal

    def one(rows: slice) -> None:
        turned = np.ascontiguousarray(values[rows].T)
        error[rows] = _sweep(turned, factor.ahead, weights, scales[:, rows], levels, grid)
        made[rows] = turned.T

    list(in_threads(one, parts))
    return made, error


def _sweep(turned: Float32, ahead: Float32, weights: Float32, scales: Float32, levels: Float32, grid: Grid) -> Float64:
    """turned [in, rows] becomes what is made of it; scales [groups, rows]. Returns the error [rows]."""
    moved, error = np.zeros_like(turned), np.zeros(turned.shape[1])
    for start in range(0, len(turned), grid.block):
        stop = min(start + grid.block, len(turned))
        here, own = slice(start, stop), turned[start:stop]
        square, scale, kept = np.ascontiguousarray(ahead[here, here]), scales[grid.groups[here]], None
        if grid.prune:
            # `moved` is for a column whose forerunners are fixed; with those of this block free they share the move.
            best = own + np.linalg.solve(square.T, moved[here])
            kept = np.ascontiguousarray(grid.prune(here, np.ascontiguousarray(best.T)).T)
        turned[here], lost, more = _native.sweep("", own, moved[here], square, scale, levels, weights[here], kept)
        error += more
        if stop < len(turned):
            moved[stop:] += ahead[here, stop:].T @ lost
    return error


def loss(difference: Float32, hessian: npt.NDArray[Any]) -> Float64:
    """d H d^T of each row of a difference [out, in]: what it adds to the squared error at the output; [out]."""
    moved = difference @ np.asarray(hessian, np.float32)
    found: Float64 = np.einsum("rc,rc->r", moved, difference, dtype=np.float64)
    return found
