"""Integers whose group scales leave the least error at the layer's output: some extremes are clipped for the rest.

For each row and group the scale is searched that minimises sum_j m_j (w_j - scale * q_j)^2, where m_j is the mean
square of input feature j (the diagonal of the layer's Gauss-Newton matrix); then refitted by least squares.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Moments
from hasten.compress.methods._groups import best_scales, cut, extremes, in_threads
from hasten.formats import Format, Weight

RATIOS = {
    "int8": (1.0, 0.98, 0.96, 0.93, 0.9),
    "int4": (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.62, 0.55),
}
LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}


def supports(format: Format) -> bool:
    return format.kind in LEVELS


def apply(values: Float32, format: Format, moments: Moments | None = None) -> Weight:
    low, high = LEVELS[format.kind]

    def nearest(quotients: Float32) -> Float32:
        np.rint(quotients, out=quotients)
        return np.clip(quotients, low, high, out=quotients)

    chunks, weights = cut(values, moments, format.group)

    def scales_of(chunk: Float32) -> Float32:
        base = extremes(chunk) / np.float32(low)
        return best_scales(chunk, weights, base, RATIOS[format.kind], nearest)[0]

    return format.pack(values, scales=np.concatenate(list(in_threads(scales_of, chunks))))
