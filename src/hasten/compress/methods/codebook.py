"""The 16, 8, 4 or 2 levels of a codebook learned for each matrix, with searched group scales.

Values divided by their group's scale are gathered in a histogram, weighted by what an error there does to the output;
its optimal levels are found exactly, by dynamic programming (one-dimensional k-means: Wang and Song 2011,
Ckmeans.1d.dp). Then the scales are searched for those levels, and both steps repeat.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten.compress.methods import Float32, Inputs, Moments
from hasten.compress.methods._groups import Round, best_scales, cut, extremes, half, in_threads, quotients
from hasten.formats import Format, Weight
from hasten.formats.codebook import DEFAULTS, Codebook

LOW, HIGH = -64, 63
STEPS = 2  # histogram bins a level
RATIOS = (1.06, 1.0, 0.95, 0.9, 0.85, 0.79, 0.72)
ROUNDS = 2
NEEDS = "moments"

Float64 = npt.NDArray[np.float64]


def supports(format: Format) -> bool:
    return isinstance(format, Codebook)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    assert isinstance(format, Codebook)
    levels, scales = learned(values, format, inputs.moments)
    return format.pack(values, scales=scales, codebook=levels)


def learned(values: Float32, format: Codebook, moments: Moments | None) -> tuple[npt.NDArray[np.int8], Float32]:
    """Levels [entries] and scales [rows, groups] of the least error."""
    chunks, weights = cut(values, moments, format.group)
    base = [half(extremes(chunk) / np.float32(LOW)) for chunk in chunks]  # the extreme is the lowest level
    scales, best, least = base, None, np.inf
    for _ in range(ROUNDS):
        levels = optimal_levels(*histogram(chunks, scales, weights), format.entries)
        found = _search(chunks, weights, base, rounding(levels))
        scales = [s for s, _ in found]
        error = sum(float(e.sum(dtype=np.float64)) for _, e in found)
        if error < least:
            best, least = (levels, scales), error
    assert best is not None
    if not best[0].any():  # a matrix of zeros
        return DEFAULTS[format.bits], np.concatenate(base)
    return best[0], np.concatenate(best[1])


def fitted(values: Float32, levels: npt.NDArray[np.int8], group: int, moments: Moments | None) -> Float32:
    """The scales [rows, groups] of the least error for levels that are given."""
    chunks, weights = cut(values, moments, group)
    widest = np.float32(levels[np.abs(levels.astype(np.int16)).argmax()])
    base = [half(extremes(chunk) / widest) for chunk in chunks]
    return np.concatenate([s for s, _ in _search(chunks, weights, base, rounding(levels))])


def _search(
    chunks: list[Float32], weights: Float32, base: list[Float32], nearest: Round
) -> list[tuple[Float32, Float32]]:
    """Scales and errors [rows, groups] of each chunk."""

    def one(pair: tuple[Float32, Float32]) -> tuple[Float32, Float32]:
        return best_scales(pair[0], weights, pair[1], RATIOS, nearest)

    return list(in_threads(one, list(zip(chunks, base, strict=True))))


def rounding(levels: npt.NDArray[np.int8]) -> Round:
    """quotients -> nearest levels, by a table over half-levels: borders between integers fall on no finer grid."""
    ordered = np.sort(levels).astype(np.float32)
    table = ordered[np.searchsorted(ordered[:-1] + ordered[1:], np.arange(-129, 129), side="right")]

    def nearest(ratio: Float32) -> Float32:
        ratio *= 2
        np.floor(ratio, out=ratio)
        np.clip(ratio, -129, 128, out=ratio)
        found: Float32 = table[ratio.astype(np.int16) + 129]
        return found

    return nearest


def histogram(chunks: list[Float32], scales: list[Float32], weights: Float32) -> tuple[Float64, Float64]:
    """Weight, and weight times value, of quotients in each bin between LOW and HIGH: [bins] both."""
    bins = (HIGH - LOW) * STEPS + 1
    mass, moment = np.zeros(bins), np.zeros(bins)
    for chunk, scale in zip(chunks, scales, strict=True):
        ratio = np.clip(quotients(chunk, scale), LOW, HIGH)
        index = np.rint((ratio - LOW) * STEPS).astype(np.int64).ravel()
        weight = (weights * (scale * scale)[:, :, None]).ravel()
        mass += np.bincount(index, weight, bins)
        moment += np.bincount(index, weight * ratio.ravel(), bins)
    return mass, moment


def optimal_levels(mass: Float64, moment: Float64, entries: int) -> npt.NDArray[np.int8]:
    """The `entries` integer levels of least weighted squared error, ascending: int8 [entries]."""
    bins = len(mass)
    grid = LOW + np.arange(bins) / STEPS
    sums = np.zeros((3, bins + 1))
    np.cumsum(np.stack([mass, moment, mass * grid * grid]), axis=1, out=sums[:, 1:])
    weight, first, second = (s[None, :] - s[:, None] for s in sums)  # [from, to): to on the second axis
    empty = weight <= 1e-12 * sums[0, -1]
    mean = np.divide(first, weight, out=np.zeros_like(first), where=~empty)
    cost = np.where(empty, 0.0, second - mean * first)
    cost[np.tril_indices(bins + 1, -1)] = np.inf
    best, back = cost[0], []
    for _ in range(entries - 1):
        through = best[:, None] + cost  # the last level covers [from, to)
        back.append(through.argmin(axis=0))
        best = through[back[-1], np.arange(bins + 1)]
    stop, levels = bins, []
    for previous in [*reversed(back), None]:
        start = 0 if previous is None else int(previous[stop])
        levels.append(mean[start, stop])
        stop = start
    return np.sort(np.clip(np.rint(levels), LOW, HIGH)).astype(np.int8)
