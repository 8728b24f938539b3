"""What methods for grouped formats share: a matrix cut into groups of columns, and the choice of a scale for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.errors import FormatError

Float32 = npt.NDArray[np.float32]
Round = Callable[[Float32], Float32]
"""quotients -> the nearest levels; may overwrite its argument."""

S = TypeVar("S")
T = TypeVar("T")
CHUNK = 1 << 17  # elements worked on at once: they stay in the cache through a dozen passes


def cut(values: Float32, moments: npt.NDArray[np.floating] | None, group: int) -> tuple[list[Float32], Float32]:
    """values [rows, columns] -> chunks [some rows, groups, group], padded with zeros, and weights [groups, group].

    Padding weighs nothing. Where all moments are zero (a feature site that never fires), all columns weigh alike.
    """
    rows, columns = values.shape
    groups = -(-columns // group)
    weights = np.zeros(groups * group, np.float32)
    weights[:columns] = 1.0 if moments is None or not moments.any() else moments / moments.mean()
    height = max(1, CHUNK // (groups * group))
    return [_pad(values[i : i + height], groups, group) for i in range(0, rows, height)], weights.reshape(groups, group)


def _pad(part: Float32, groups: int, group: int) -> Float32:
    if part.shape[1] == groups * group:
        return part.reshape(len(part), groups, group)
    padded = np.zeros((len(part), groups * group), np.float32)
    padded[:, : part.shape[1]] = part
    return padded.reshape(len(part), groups, group)


def in_threads(work: Callable[[S], T], chunks: list[S]) -> Iterator[T]:
    """work(chunk) for every chunk, in order. NumPy lets go of the GIL, so threads help."""
    if len(chunks) == 1:
        yield work(chunks[0])
        return
    with ThreadPoolExecutor(min(len(chunks), _native.granted_threads())) as pool:
        yield from pool.map(work, chunks)


def extremes(chunk: Float32) -> Float32:
    """The value of largest magnitude of each group, with its sign: [rows, groups]."""
    high, low = chunk.max(axis=2), chunk.min(axis=2)
    found: Float32 = np.where(high > -low, high, low)
    return found


def half(scales: Float32) -> Float32:
    """Scales as f16 will store them. Raises FormatError where it cannot."""
    with np.errstate(over="ignore", under="ignore"):
        rounded: Float32 = scales.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise FormatError("a scale is NaN or beyond what f16 holds (65504)", "store this matrix as bf16 or f32")
    return rounded


def best_scales(
    chunk: Float32, weights: Float32, base: Float32, ratios: Sequence[float], nearest: Round
) -> tuple[Float32, Float32]:
    """The scale of each group [rows, groups] that leaves the least weighted squared error, and that error.

    Tries base * ratio for each ratio, then the least-squares scale of the winner's levels.
    """
    best, least = half(base), np.full(base.shape, np.inf, np.float32)
    levels = np.zeros_like(chunk)
    for ratio in ratios:
        scales = half(base * np.float32(ratio))
        error, rounded = _error(chunk, weights, scales, nearest)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
        np.copyto(levels, rounded, where=better[:, :, None])
    weighted = levels * weights
    norm = np.einsum("rgc,rgc->rg", weighted, levels)
    fit = half(np.divide(np.einsum("rgc,rgc->rg", weighted, chunk), norm, out=best.copy(), where=norm > 0))
    error, _ = _error(chunk, weights, fit, nearest)
    better = error < least
    return np.where(better, fit, best), np.where(better, error, least)


def quotients(chunk: Float32, scales: Float32) -> Float32:
    """chunk / scales, zero where the scale is."""
    divisor: Float32 = np.where(scales == 0, np.float32(np.inf), scales).astype(np.float32)
    return chunk / divisor[:, :, None]


def _error(chunk: Float32, weights: Float32, scales: Float32, nearest: Round) -> tuple[Float32, Float32]:
    levels = nearest(quotients(chunk, scales))
    difference = levels * scales[:, :, None]
    difference -= chunk
    difference *= difference
    return np.einsum("rgc,gc->rg", difference, weights), levels
