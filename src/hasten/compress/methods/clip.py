"""Integers whose group scales leave the least error at the layer's output: some extremes are clipped for the rest.

For each row and group the scale is searched that minimises sum_j m_j (w_j - scale * q_j)^2, where m_j is the mean
square of input feature j (the diagonal of the layer's Gauss-Newton matrix); then refitted by least squares.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Inputs, Moments
from hasten.compress.methods._groups import Round, best_scales, cut, extremes, in_threads
from hasten.formats import Format, Weight

RATIOS = {
    "int8": (1.0, 0.98, 0.96, 0.93, 0.9),
    "int4": (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.62, 0.55),
    "int3": (1.04, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.54, 0.48, 0.42),
    "int2": (1.0, 0.92, 0.85, 0.79, 0.73, 0.67, 0.62, 0.57, 0.52, 0.47, 0.42, 0.36, 0.3),
    "int1": (1.0,),  # the signs whatever the scale; the fit by least squares finds it
}
LEVELS = {"int8": (-127, 127), "int4": (-8, 7), "int3": (-4, 3), "int2": (-3, 3), "int1": (-1, 1)}
NEEDS = "moments"
ODD = ("int2", "int1")
"""Kinds whose levels are the odd integers."""


def supports(format: Format) -> bool:
    return format.kind in LEVELS


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    return format.pack(values, scales=best(values, format.kind, format.group, inputs.moments))


def best(values: Float32, kind: str, group: int, moments: Moments | None) -> Float32:
    """The scales [rows, groups] of integers of `kind` that leave the least error."""
    chunks, weights = cut(values, moments, group)
    nearest = rounding(kind)

    def scales_of(chunk: Float32) -> Float32:
        base = extremes(chunk) / np.float32(LEVELS[kind][0])
        return best_scales(chunk, weights, base, RATIOS[kind], nearest)[0]

    return np.concatenate(list(in_threads(scales_of, chunks)))


def rounding(kind: str) -> Round:
    """quotients -> the nearest levels of integers of `kind`."""
    low, high = LEVELS[kind]

    def nearest(quotients: Float32) -> Float32:
        if kind in ODD:
            quotients *= np.float32(0.5)
            np.floor(quotients, out=quotients)
            quotients *= 2
            quotients += 1
        else:
            np.rint(quotients, out=quotients)
        return np.clip(quotients, low, high, out=quotients)

    return nearest
