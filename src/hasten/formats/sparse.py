"""Half of the weights as 8-bit integers, wherever they stand; the others are zeros (layout: native/core.h).

Of each block of 16 rows by 32 columns 256 weights are stored, in the order of their places, and a bit for every place.
So many in every block, rather than in the matrix, makes a weight's bytes a function of its shape, and any block's
address too: nothing to look up, and no offset in a file to distrust. On weights of heavy tails whose inputs' sizes vary
by a factor of e either way, pruning by blocks leaves 7% more error than pruning the matrix as a whole (2:4: 270%).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
from hasten.formats import _blocks
from hasten.formats._blocks import PANEL, UNIT, UInt8
from hasten.formats.base import Float32, Weight
from hasten.formats.dense import CHUNK, check_values, panel_chunks
from hasten.formats.integer import Integer

PLACES, STORED = PANEL * UNIT, PANEL * UNIT // 2
TURN = np.uint8(128)
_POPCOUNT = np.array([i.bit_count() for i in range(256)], np.uint8)


@dataclass(frozen=True)
class Sparse(Integer):
    """value = int8 * scale where one is stored, else 0."""

    def array_specs(self, rows: int, columns: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        shape = (-(-rows // PANEL), -(-columns // UNIT), STORED + PLACES // 8)
        return {**super().array_specs(rows, columns), "codes": (np.dtype(np.uint8), shape)}

    def check(self, arrays: Any) -> None:
        super().check(arrays)
        blocks = arrays["codes"].reshape(-1, STORED + PLACES // 8)
        for start in range(0, len(blocks), CHUNK // PLACES):
            counts = _POPCOUNT[blocks[start : start + CHUNK // PLACES, STORED:]].sum(axis=1, dtype=np.int64)
            if bool((counts != STORED).any()):
                wrong = int(counts[counts != STORED][0])
                raise FormatError(
                    f"{self.name} array 'codes' has a mask of {wrong} places, must be {STORED} of {PLACES}"
                )

    def pack(self, values: Float32, **parameters: Any) -> Weight:
        """pack(values, scales=None): as int8, after the smaller half of every block has become zero."""
        check_values(values, self.name)
        return super().pack(larger_half(np.abs(values), values), **parameters)

    def _pack(self, codes: UInt8) -> UInt8:
        places = _blocks.lines(codes).reshape(len(codes) // PANEL, -1, PLACES)
        # Stored are the codes that are not zero and, up to STORED, the first that are.
        order = np.argsort(places == TURN, axis=2, kind="stable")
        mask = np.zeros(places.shape, bool)
        np.put_along_axis(mask, order[:, :, :STORED], True, axis=2)
        stored = (places[mask] ^ TURN).reshape(*places.shape[:2], STORED)
        return np.concatenate([stored, np.packbits(mask, axis=2, bitorder="little")], axis=2)

    def _unpack(self, packed: UInt8) -> UInt8:
        mask = np.unpackbits(packed[:, :, STORED:], axis=2, bitorder="little").view(bool)
        places = np.full(mask.shape, TURN)
        places[mask] = (packed[:, :, :STORED] ^ TURN).reshape(-1)
        return _blocks.unlined(places)

    def _random_pool(self, rng: np.random.Generator) -> UInt8:
        masks = rng.permuted(np.tile(np.arange(PLACES) < STORED, (251, 1)), axis=1)
        values = rng.integers(-127, 128, (251, STORED), np.int8).view(np.uint8)
        return np.concatenate([values, np.packbits(masks, axis=1, bitorder="little")], axis=1).reshape(-1)


def larger_half(scores: npt.NDArray[np.floating[Any]], values: Float32) -> Float32:
    """`values` [rows, columns] with zeros at the places whose scores, of the same shape, are the lower half of a block.

    Absent rows and columns count as the lowest.
    """
    rows, columns = values.shape
    kept = np.zeros_like(values)
    for panel0, panel1 in panel_chunks(rows, columns):
        first, last = panel0 * PANEL, min(panel1 * PANEL, rows)
        padded = np.full(((panel1 - panel0) * PANEL, -(-columns // UNIT) * UNIT), -1.0, np.float32)
        padded[: last - first, :columns] = scores[first:last]
        blocks = padded.reshape(-1, PANEL, padded.shape[1] // UNIT, UNIT).swapaxes(1, 2)
        flat = blocks.reshape(-1, PLACES)
        keep = np.zeros(flat.shape, bool)
        np.put_along_axis(keep, np.argpartition(flat, STORED, axis=1)[:, STORED:], True, axis=1)
        spread = keep.reshape(blocks.shape).swapaxes(1, 2).reshape(padded.shape)[: last - first, :columns]
        np.copyto(kept[first:last], values[first:last], where=spread)
    return kept


FORMATS = {f"sparse8-g{group}": Sparse(f"sparse8-g{group}", "sparse8", group) for group in (32, 64, 128)}
