"""Sums over many tokens of what flows through one site, made by the core in threads.

Outer products are summed in integers: of 256 tokens at a time a feature is rounded to 2895 steps of its peak, which is
far finer than what calibrating on other text changes, and twice as fast as in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.backends.batch import Float32
from hasten.compress.methods._groups import in_threads

TOKENS: int = _native.OUTER_TOKENS
CHUNKS = 8
"""Of `TOKENS`, whose outer products are added at once."""
PANEL = 16
COLUMNS = 4 * PANEL
"""Of the sum, that a thread adds to at a time."""
MIRRORED = 512


class Moments:
    """Of x [tokens, width]: sums of squares and sizes, peaks, and, with `second`, the sum of x xᵀ [width, width]."""

    def __init__(self, width: int, second: bool) -> None:
        self.tokens = 0
        self.squares, self.magnitudes, self.peaks = np.zeros((3, width))
        self._second = np.zeros((width, width), np.float32) if second else None
        self._waiting: list[Float32] = []

    def add(self, x: Float32) -> None:
        if not len(x):
            return
        self.tokens += len(x)
        self._waiting.append(x)
        if self._second is None or sum(len(w) for w in self._waiting) >= CHUNKS * TOKENS:
            self.settle()

    def settle(self) -> None:
        """Take what waits into the sums."""
        if not self._waiting:
            return
        x = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting = []
        parts = [np.ascontiguousarray(x[i : i + TOKENS]) for i in range(0, len(x), TOKENS)]
        panels = -(-x.shape[1] // PANEL)
        keep = self._second is not None
        codes = [np.empty((panels, len(parts), TOKENS, PANEL), np.int16)] if keep else []
        scales = [np.empty((len(parts), panels * PANEL), np.float32)] if keep else []
        squares = np.empty((len(parts), x.shape[1]))
        magnitudes, peaks = np.empty((2, *squares.shape), np.float32)

        def pack(i: int) -> None:
            own = (codes[0], scales[0]) if keep else (None, None)
            _native.outer_pack("", parts[i], squares[i], magnitudes[i], peaks[i], *own, i)

        list(in_threads(pack, list(range(len(parts)))))
        self.squares += squares.sum(axis=0)
        self.magnitudes += magnitudes.sum(axis=0, dtype=np.float64)
        np.maximum(self.peaks, peaks.max(axis=0), out=self.peaks)
        if self._second is not None:
            _add(codes[0], scales[0], self._second)

    def second(self) -> Float32 | None:
        """The mean of x xᵀ, whole; the sum is used up."""
        found, self._second = self._second, None
        if found is not None:
            found /= np.float32(self.tokens)
            for i in range(0, len(found), MIRRORED):
                for j in range(i, len(found), MIRRORED):
                    upper = found[i : i + MIRRORED, j : j + MIRRORED]
                    lower = np.triu(upper) + np.triu(upper, 1).T if i == j else upper.T
                    found[j : j + MIRRORED, i : i + MIRRORED] = lower
        return found


def _add(codes: npt.NDArray[np.int16], scales: Float32, into: Float32) -> None:
    """To the upper triangle; blocks with the most rows first, so that no thread is left with a long one."""
    starts = list(range(0, len(into), COLUMNS))[::-1]

    def add(start: int) -> None:
        last = min(start // PANEL + COLUMNS // PANEL, codes.shape[0])
        _native.outer_add("", codes, scales, into, start // PANEL, last)

    list(in_threads(add, starts))
