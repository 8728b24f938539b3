"""One column after another is rounded, and the columns still to come make up for what was lost: GPTQ and SparseGPT.

For a layer's squared error the best change of the weights not yet fixed, after weight j was moved by e, is
-e U[j, j+1:] / U[j, j], with U the upper Cholesky factor of the inverse Hessian (Frantar et al. 2022, arXiv:2210.17323,
eq. 4; Frantar and Alistarh 2023, arXiv:2301.00774). Rows do not depend on each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Fix = Callable[[slice, int, Float32, Float32], Float32]
"""(rows, column, values [rows], the block's values still to come [columns, rows]) -> the values that they become."""
DAMPING = 0.01
BLOCK = 128
ROWS = 512
"""Rows swept together: a block of columns of them stays in the cache."""


def factor(hessian: npt.NDArray[Any], order: npt.NDArray[Any], damping: float = DAMPING) -> Float32:
    """U upper triangular with (H + d I)^-1 = U^T U, H's rows and columns taken in `order`; [in, in].

    `damping` is d relative to H's mean diagonal. A Hessian that is singular all the same is damped tenfold until it is
    not; features that are always zero stay alone. Raises FormatError where that never ends.
    """
    matrix = np.asarray(hessian)[np.ix_(order[::-1], order[::-1])].astype(np.float64)
    mean = float(matrix.trace()) / len(matrix)
    if not np.isfinite(matrix).all() or mean < 0:
        raise FormatError("the second moments of a matrix's inputs are not finite", "calibrate on another text")
    if mean == 0:
        return np.eye(len(matrix), dtype=np.float32)
    diagonal = np.arange(len(matrix))
    for _ in range(6):
        damped = matrix.copy()
        damped[diagonal, diagonal] += damping * mean
        try:
            lower = np.asarray(np.linalg.cholesky(damped), np.float64)
            break
        except np.linalg.LinAlgError:
            damping *= 10
    else:
        raise FormatError("the second moments of a matrix's inputs are no covariance", "calibrate on more text")
    # With rows and columns reversed H = L L^T, so H = R R^T with R = L reversed, upper; then U = R^-1.
    return np.ascontiguousarray(inverse_lower(lower)[::-1, ::-1].astype(np.float32))


def inverse_lower(lower: Float64) -> Float64:
    """The inverse of a lower triangular matrix, by halves: nearly all of the work is matrix products."""
    size = len(lower)
    if size <= 64:
        return np.tril(np.linalg.inv(lower))
    middle = size // 2
    first, last = inverse_lower(lower[:middle, :middle]), inverse_lower(lower[middle:, middle:])
    found = np.zeros_like(lower)
    found[:middle, :middle], found[middle:, middle:] = first, last
    found[middle:, :middle] = -last @ (lower[middle:, :middle] @ first)
    return found


def sweep(values: Float32, upper: Float32, fix: Fix) -> Float32:
    """values [out, in], columns in the order of `upper` -> the values that `fix` made of them, in that order."""
    made = np.empty_like(values)
    parts = [slice(i, min(i + ROWS, len(values))) for i in range(0, len(values), ROWS)]

    def one(rows: slice) -> None:
        made[rows] = _sweep(np.ascontiguousarray(values[rows].T), upper, rows, fix).T

    if len(parts) == 1:
        one(parts[0])
    else:
        with ThreadPoolExecutor(min(len(parts), _cores())) as pool:
            list(pool.map(one, parts))
    return made


def _sweep(turned: Float32, upper: Float32, rows: slice, fix: Fix) -> Float32:
    """turned [in, rows], overwritten."""
    columns = len(turned)
    made = np.empty_like(turned)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        lost = np.empty((stop - start, turned.shape[1]), np.float32)
        for column in range(start, stop):
            own = turned[column]
            made[column] = fix(rows, column, own, turned[column:stop])
            np.divide(own - made[column], upper[column, column], out=lost[column - start])
            if column + 1 < stop:
                turned[column + 1 : stop] -= np.outer(upper[column, column + 1 : stop], lost[column - start])
        if stop < columns:
            turned[stop:] -= upper[start:stop, stop:].T @ lost
    return made


def loss(difference: Float32, hessian: npt.NDArray[Any]) -> Float64:
    """d H d^T of each row of a difference [out, in]: what it adds to the squared error at the output; [out]."""
    moved = difference @ np.asarray(hessian, np.float32)
    found: Float64 = np.einsum("rc,rc->r", moved, difference, dtype=np.float64)
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
