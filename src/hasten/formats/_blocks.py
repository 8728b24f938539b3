"""Blocks of 16 rows by 32 columns, as kernels read them: lines of 64 places and planes of bits (native/core.h)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PANEL = 16
UNIT = 32
UInt8 = npt.NDArray[np.uint8]


def lines(rows: UInt8) -> UInt8:
    """A byte a weight [height, columns], whole panels and units -> [panels, blocks, 8, 64]: places in their order."""
    fours = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, PANEL, rows.shape[1] // 4)
    return np.ascontiguousarray(fours.swapaxes(1, 2)).view(np.uint8).reshape(len(fours), -1, 8, 64)


def unlined(places: UInt8) -> UInt8:
    """The inverse of lines."""
    fours = np.ascontiguousarray(places).view(np.uint32).reshape(len(places), -1, PANEL)
    return np.ascontiguousarray(fours.swapaxes(1, 2)).view(np.uint8).reshape(len(places) * PANEL, -1)


def pack(codes: UInt8, bits: int) -> UInt8:
    """Codes [height, columns] -> [panels, lines, 16, 4], `bits` lines a block."""
    places = lines(codes)
    parts = [_plane(places & np.uint8(3), 2), _plane(places >> np.uint8(2), 1)] if bits == 3 else [_plane(places, bits)]
    packed = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    return packed.reshape(len(packed), -1, PANEL, 4)


def unpack(packed: UInt8, bits: int) -> UInt8:
    """The inverse of pack."""
    blocks = packed.reshape(len(packed), -1, bits, 64)
    if bits == 3:
        return unlined(_places(blocks[:, :, :2], 2) | _places(blocks[:, :, 2:], 1) << np.uint8(2))
    return unlined(_places(blocks, bits))


def _plane(places: UInt8, bits: int) -> UInt8:
    """[panels, blocks, 8, 64] -> [panels, blocks, bits, 64]: 8 / bits lines side by side in each byte."""
    together = places.reshape(*places.shape[:2], bits, 8 // bits, 64)
    packed = together[:, :, :, 0]
    for line in range(1, 8 // bits):
        packed = packed | together[:, :, :, line] << np.uint8(bits * line)
    return packed


def _places(plane: UInt8, bits: int) -> UInt8:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found = plane[:, :, :, None] >> shifts & np.uint8((1 << bits) - 1)
    return found.reshape(*plane.shape[:2], 8, 64)
