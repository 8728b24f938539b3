"""Four bits a weight, or three, two, one, that choose among the levels of one codebook a matrix, with group scales.

The default codebook of four bits is NF4 (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E), its values scaled to
+-63 and rounded: levels are 7-bit, so that AVX2's byte products never saturate. Three bits: the same construction.
Two and one: evenly spaced, with no level at zero (as int2 and int1 have them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import FormatError
from hasten.formats._blocks import UInt8
from hasten.formats.base import Arrays, Float32
from hasten.formats.integer import Grouped

ZERO = 64
DEFAULTS = {
    4: np.array([-63, -44, -33, -25, -18, -12, -6, 0, 5, 10, 16, 21, 28, 35, 46, 63], np.int8),
    3: np.array([-63, -30, -14, 0, 10, 21, 35, 63], np.int8),
    2: np.array([-63, -21, 21, 63], np.int8),
    1: np.array([-63, 63], np.int8),
}


@dataclass(frozen=True)
class Codebook(Grouped):
    """value = (codebook[code] - 64) * scale."""

    @property
    def entries(self) -> int:
        return 1 << self.bits

    def array_specs(self, rows: int, columns: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return {**super().array_specs(rows, columns), "codebook": (np.dtype(np.uint8), (self.entries,))}

    def check(self, arrays: Any) -> None:
        super().check(arrays)
        if bool((arrays["codebook"] > 127).any()):
            raise FormatError(f"{self.name} array 'codebook' holds {arrays['codebook'].max()}, entries are at most 127")

    def _parameter_arrays(self, parameters: dict[str, Any]) -> Arrays:
        """codebook=None: 2^bits integers from -64 to 63, in any order; without, the default."""
        levels = np.asarray(parameters.pop("codebook", DEFAULTS[self.bits]))
        if parameters:
            raise FormatError(f"{self.name} takes the parameters 'scales' and 'codebook', not {sorted(parameters)}")
        whole = levels.shape == (self.entries,) and bool((levels == np.rint(levels)).all())
        if not whole or not bool(((levels >= -64) & (levels <= 63)).all()):
            raise FormatError(
                f"{self.name} codebook is {levels.tolist()}, must be {self.entries} integers from -64 to 63"
            )
        if not bool(levels.any()):
            raise FormatError(f"{self.name} codebook holds nothing but zeros")
        return {"codebook": (levels.astype(np.int16) + ZERO).astype(np.uint8)}

    def _levels(self, arrays: Arrays) -> Float32:
        return arrays["codebook"].astype(np.float32) - np.float32(ZERO)

    def _absmax(self, grouped: Float32, arrays: Arrays) -> Float32:
        return np.asarray(np.abs(grouped).max(axis=2) / np.abs(self._levels(arrays)).max(), np.float32)

    def _nearest(self, quotients: Float32, arrays: Arrays) -> UInt8:
        levels = self._levels(arrays)
        order = np.argsort(levels, kind="stable").astype(np.uint8)
        # Levels are integers, so the borders between them are whole multiples of a half: floor(2q) decides exactly.
        borders = levels[order[:-1]] + levels[order[1:]]  # twice the midpoints
        table = order[np.searchsorted(borders, np.arange(-129, 129), side="right")]
        with np.errstate(over="ignore"):
            quotients *= 2
        np.floor(quotients, out=quotients)
        np.clip(quotients, -129, 128, out=quotients)
        return table[quotients.astype(np.int16) + 129]


FORMATS = {
    f"codebook{bits}-g{group}": Codebook(f"codebook{bits}-g{group}", f"codebook{bits}", group)
    for bits in DEFAULTS
    for group in (32, 64, 128)
}
