"""GPTQ: each column is rounded in turn and the columns after it make up for the error, for integers and codebooks.

Frantar et al. 2022 (arXiv:2210.17323), with activation order, damping of a hundredth and blocks of 128 columns. Group
scales are searched beforehand, so that columns may go in any order ("static groups"); afterwards each row's scales are
solved for together, by least squares under the same Hessian, and the sweep is done once more with those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.compress.methods import Float32, Inputs, clip, codebook
from hasten.compress.methods._groups import Round, half, in_threads
from hasten.compress.methods._sweep import Float64, Grid, factor, sweep
from hasten.formats import Format, Weight
from hasten.formats.codebook import Codebook

NEEDS = "hessian"
AGAIN = 2
"""Sweeps after the first, each with scales refitted to the codes of the best so far."""
REFIT_ROWS = 128
MOST_GROUPS = 256
"""Rows of more groups keep the scales that were searched: solving for theirs would take too long."""


def supports(format: Format) -> bool:
    return format.kind in clip.LEVELS or isinstance(format, Codebook)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    assert inputs.hessian is not None
    nearest: Round
    if isinstance(format, Codebook):
        levels, scales = codebook.learned(values, format, inputs.moments)
        nearest, more = codebook.rounding(levels), {"codebook": levels}
    else:
        scales = clip.best(values, format.kind, format.group, inputs.moments)
        nearest, more = clip.rounding(format.kind), {}
    made, scales = quantised(values, scales, format.group, nearest, inputs.hessian)
    return format.pack(made, scales=scales, **more)


def quantised(
    values: Float32, scales: Float32, group: int, nearest: Round, hessian: npt.NDArray[Any]
) -> tuple[Float32, Float32]:
    """values [out, in] and scales [out, groups] -> the values on the grid, and their scales."""
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    back = np.argsort(order)
    known = factor(hessian, order)
    turned = np.ascontiguousarray(values[:, order])

    def swept(scales: Float32) -> tuple[Float32, Float64]:
        made, error = sweep(turned, known, Grid(scales, order // group, nearest))
        return made[:, back], error

    made, least = swept(scales)
    if scales.shape[1] > MOST_GROUPS:
        return made, scales
    best, pulled = (made, scales), values @ np.asarray(hessian, np.float32)
    for _ in range(AGAIN):
        refitted = refit(pulled, *best, group, hessian)
        made, error = swept(refitted)
        better = (error < least)[:, None]
        best = (np.where(better, made, best[0]), np.where(better, refitted, best[1]))
        least = np.minimum(error, least)
    return best


def refit(pulled: Float32, made: Float32, scales: Float32, group: int, hessian: npt.NDArray[Any]) -> Float32:
    """Scales [out, groups] that leave each row the least error under the Hessian, its levels as they are.

    A row's output is linear in its scales: with L[g] its levels in group g, the normal equations are
    sum_h (L[g] H L[h]) s[h] = L[g] H w. `pulled` is w H of every row [out, in].
    """
    columns, groups = made.shape[1], scales.shape[1]
    whole: Float32 = np.ascontiguousarray(hessian, np.float32)
    if columns < groups * group:
        whole = np.zeros((groups * group, groups * group), np.float32)
        whole[:columns, :columns] = hessian
    parts = [slice(i, i + REFIT_ROWS) for i in range(0, len(made), REFIT_ROWS)]

    def one(rows: slice) -> Float32:
        return _refit(pulled[rows], made[rows], scales[rows], group, whole)

    return np.concatenate(list(in_threads(one, parts)))


def _refit(pulled: Float32, made: Float32, scales: Float32, group: int, hessian: Float32) -> Float32:
    """Of some rows; `hessian` is padded to whole groups."""
    (rows, columns), groups = made.shape, scales.shape[1]
    divisors = np.repeat(np.where(scales == 0, np.float32(np.inf), scales), group, axis=1)[:, :columns]
    levels = np.zeros((groups * group, rows), np.float32)
    levels[:columns] = np.rint(made / divisors).T
    left = _native.level_products("", levels, hessian, group)
    right = np.add.reduceat(pulled * levels[:columns].T, np.arange(0, columns, group), axis=1)
    diagonal = np.einsum("rgg->rg", left)  # a view
    ridge = (1e-6 * diagonal.mean(axis=1) + 1e-30).astype(np.float32)
    diagonal += ridge[:, None]
    right += ridge[:, None] * scales
    solved = _native.solve_positive("", left, right)
    used = diagonal > 2 * ridge[:, None]
    usable = used & np.isfinite(solved) & (np.abs(solved) < 60000)
    return half(np.where(usable, solved, scales).astype(np.float32))
