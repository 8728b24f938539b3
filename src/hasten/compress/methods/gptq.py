"""GPTQ: each column is rounded in turn and the columns after it make up for the error, for integers and codebooks.

Frantar et al. 2022 (arXiv:2210.17323), with activation order, damping of a hundredth and blocks of 128 columns. Group
scales are searched beforehand, so that columns may go in any order ("static groups"); afterwards each row's scales are
solved for together, by least squares under the same Hessian, and the sweep is done once more with those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.compress.methods import Float32, Inputs, clip, codebook
from hasten.compress.methods._groups import Round, half
from hasten.compress.methods._sweep import factor, loss, sweep
from hasten.formats import Format, Weight
from hasten.formats.codebook import Codebook

NEEDS = "hessian"
AGAIN = 2
"""Sweeps after the first, each with scales refitted to the codes of the best so far."""
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
    upper = factor(hessian, order)
    turned = np.ascontiguousarray(values[:, order])

    def swept(scales: Float32) -> Float32:
        return sweep(turned, upper, rounder(scales, order, group, nearest))[:, back]

    made = swept(scales)
    if scales.shape[1] > MOST_GROUPS:
        return made, scales
    best, least = (made, scales), loss(made - values, hessian)
    for _ in range(AGAIN):
        refitted = refit(values, *best, group, hessian)
        made = swept(refitted)
        error = loss(made - values, hessian)
        better = (error < least)[:, None]
        best = (np.where(better, made, best[0]), np.where(better, refitted, best[1]))
        least = np.minimum(error, least)
    return best


def rounder(
    scales: Float32, order: npt.NDArray[Any], group: int, nearest: Round
) -> Callable[[slice, int, Float32, Float32], Float32]:
    """What a sweep does to a column: to the nearest of its group's levels."""
    by_group = np.ascontiguousarray(scales.T)  # [groups, out]
    divisors: Float32 = np.where(by_group == 0, np.float32(np.inf), by_group).astype(np.float32)

    def fix(rows: slice, column: int, values: Float32, rest: Float32) -> Float32:
        place = order[column] // group
        return nearest(values / divisors[place, rows]) * by_group[place, rows]

    return fix


def refit(values: Float32, made: Float32, scales: Float32, group: int, hessian: npt.NDArray[Any]) -> Float32:
    """Scales [out, groups] that leave each row the least error under the Hessian, its levels as they are.

    A row's output is linear in its scales: with L[g] its levels in group g, the normal equations are
    sum_h (L[g] H L[h]) s[h] = L[g] H w.
    """
    rows, columns = values.shape
    groups = scales.shape[1]
    padded = np.zeros((rows, groups * group), np.float32)
    levels, target = padded, padded.copy()
    divisors = np.repeat(np.where(scales == 0, np.float32(np.inf), scales), group, axis=1)[:, :columns]
    levels[:, :columns] = np.rint(made / divisors)
    target[:, :columns] = values
    wide = np.zeros((groups * group, groups * group), np.float32)
    wide[:columns, :columns] = hessian
    right = np.einsum("rgc,rgc->rg", (target @ wide).reshape(rows, groups, group), levels.reshape(rows, groups, group))
    left = np.empty((rows, groups, groups), np.float32)
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        products = (levels[:, part] @ wide[part]) * levels  # [rows, in]
        left[:, g] = products.reshape(rows, groups, group).sum(axis=2)
    ridge = 1e-6 * np.einsum("rgg->rg", left).mean(axis=1) + 1e-30
    left += ridge[:, None, None] * np.eye(groups, dtype=np.float32)
    right += ridge[:, None] * scales
    solved = np.linalg.solve(left.astype(np.float64), right[:, :, None].astype(np.float64))[:, :, 0]
    used = np.einsum("rgg->rg", left) > 2 * ridge[:, None]
    usable = used & np.isfinite(solved) & (np.abs(solved) < 60000)
    return half(np.where(usable, solved, scales).astype(np.float32))
