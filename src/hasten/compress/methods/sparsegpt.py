"""SparseGPT: weights are pruned and rounded block by block, and the columns after make up for what was lost.

Frantar and Alistarh 2023 (arXiv:2301.00774), jointly with quantisation (its section 3.4): in each block of the format,
16 rows by 32 columns, the half with the smaller w^2 / [H^-1][j, j] becomes zero, H being of the columns from j on.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods._sweep import ROWS, Factor, Grid, factor, sweep
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
    known = factor(inputs.hessian, order)
    # Scales of a first guess at what stays: levels are fine enough that updates seldom leave them.
    kept = wanda(values, format, inputs).dense()
    scales = best(kept, "int8", format.group, inputs.moments)
    made = prune(values, scales, format.group, known)
    return format.pack(made, scales=scales)


def prune(values: Float32, scales: Float32, group: int, factor: Factor) -> Float32:
    """values [out, in] -> half of each block zero, the rest multiples of their group's scale."""

    def kept(columns: slice, own: Float32) -> Float32:
        return larger_half(np.abs(own) * factor.diagonal[columns], np.ones_like(own))

    groups = np.arange(values.shape[1]) // group
    return sweep(values, factor, Grid(scales, groups, rounding("int8"), kept, UNIT))[0]
