"""Group scales fitted to the weights alone, with an error norm that forgives outliers: no calibration text.

Half-quadratic quantisation (Badri and Shaji 2023, mobiusml.github.io/hqq_blog), with its p = 0.7 and 20 iterations: the
error W - Q(W) is split into a sparse part E, found by the generalised soft threshold for the norm p, and a rest that is
minimised in the least-squares sense. Our grids have no zero point, so it is the scale that is solved for.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods._groups import Round, cut, extremes, half, in_threads, quotients
from hasten.compress.methods.clip import LEVELS, rounding
from hasten.formats import Format, Weight

NEEDS = "nothing"
P, ITERATIONS, BETA, GROWTH = 0.7, 20, 1.0, 1.01
STARTS = (1.0, 0.85, 0.7)
"""Shares of the scale at which the extreme is a level: the iteration finds the minimum next to where it starts."""


def supports(format: Format) -> bool:
    return format.kind in LEVELS and format.kind != "int1"


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    nearest = rounding(format.kind)
    low = np.float32(LEVELS[format.kind][0])
    chunks, _ = cut(values, None, format.group)

    def scales_of(chunk: Float32) -> Float32:
        base = extremes(chunk) / low
        found = [solve(chunk, half(base * np.float32(start)), nearest) for start in STARTS]
        errors = np.stack([norm(chunk, scales, nearest) for scales in found])  # [starts, rows, groups]
        best: Float32 = np.take_along_axis(np.stack(found), errors.argmin(axis=0)[None], axis=0)[0]
        return best

    return format.pack(values, scales=np.concatenate(list(in_threads(scales_of, chunks))))


def solve(chunk: Float32, scales: Float32, nearest: Round) -> Float32:
    """chunk [rows, groups, group], scales to begin with [rows, groups] -> scales of the least p-norm seen."""
    best, least = scales, norm(chunk, scales, nearest)
    beta = BETA / np.maximum(np.abs(chunk).mean(axis=2), 1e-12)[:, :, None]  # in units of the group's weights
    for _ in range(ITERATIONS):
        levels = nearest(quotients(chunk, scales))
        sparse = shrink(chunk - levels * scales[:, :, None], beta)
        top, bottom = ((chunk - sparse) * levels).sum(axis=2), (levels * levels).sum(axis=2)
        scales = half(np.divide(top, bottom, out=scales.copy(), where=bottom > 0))
        beta = beta * np.float32(GROWTH)
        error = norm(chunk, scales, nearest)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def shrink(x: Float32, beta: Float32) -> Float32:
    """The generalised soft threshold: argmin_e |e|^p + beta/2 (e - x)^2, approximately."""
    size = np.abs(x)
    cut = np.maximum(size - np.maximum(size, np.float32(1e-12)) ** np.float32(P - 1) / beta, 0)
    return np.asarray(np.sign(x) * cut, np.float32)


def norm(chunk: Float32, scales: Float32, nearest: Round) -> Float32:
    """sum |error|^p of each group [rows, groups]."""
    error = np.abs(chunk - nearest(quotients(chunk, scales)) * scales[:, :, None])
    return np.asarray((error ** np.float32(P)).sum(axis=2), np.float32)
