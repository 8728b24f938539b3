"""SparseGPT: weights are pruned and rounded block by block, and the columns after make up for what was lost.

Frantar and Alistarh 2023 (arXiv:2301.00774), jointly with quantisation (its section 3.4): in each block of the format,
16 rows by 32 columns, the half with the smaller w^2 / U[j, j]^2 becomes zero, U^T U being the inverse Hessian.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods._sweep import ROWS, factor, sweep
from hasten.compress.methods.clip import best, rounding
from hasten.compress.methods.wanda import apply as wanda
from hasten.formats import Format, Weight
from hasten.formats._blocks import PANEL, UNIT
from hasten.formats.sparse import Sparse, larger_half

NEEDS = "hessian"
assert ROWS % PANEL == 0


def supports(format: Format) -> bool:
    return isinstance(format, Sparse)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    assert inputs.hessian is not None
    order = np.arange(values.shape[1])
    upper = factor(inputs.hessian, order)
    # Scales of a first guess at what stays: levels are fine enough that updates seldom leave them.
    kept = wanda(values, format, inputs).dense()
    scales = best(kept, "int8", format.group, inputs.moments)
    made = prune(values, scales, format.group, upper)
    return format.pack(made, scales=scales)


def prune(values: Float32, scales: Float32, group: int, upper: Float32) -> Float32:
    """values [out, in] -> half of each block zero, the rest multiples of their group's scale."""
    nearest = rounding("int8")
    by_group = np.ascontiguousarray(scales.T)
    divisors: Float32 = np.where(by_group == 0, np.float32(np.inf), by_group).astype(np.float32)
    diagonal = np.diagonal(upper)
    masks: dict[int, Float32] = {}

    def fix(rows: slice, column: int, own: Float32, rest: Float32) -> Float32:
        if column % UNIT == 0:
            block = np.ascontiguousarray(rest[:UNIT].T)  # [rows, columns of the block]
            scores = np.abs(block) / diagonal[column : column + block.shape[1]]
            masks[rows.start] = np.asarray(larger_half(scores, np.ones_like(block)).T)
        place = column // group
        rounded = nearest(own / divisors[place, rows]) * by_group[place, rows]
        return np.asarray(rounded * masks[rows.start][column % UNIT], np.float32)

    return sweep(values, upper, fix)
