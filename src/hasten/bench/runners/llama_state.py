"""llama.cpp's saved state of one sequence, stretched to more tokens than were ever computed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


def stretched(state: bytes, depth: int) -> bytearray | None:
    """`state` (llama_state_seq_get_data) with its cells repeated, in order, to `depth`; None where it reads otherwise.

    Magic, sequence, streams, cells; a position and its sequence for each cell; whether values are transposed; then for
    each layer keys [cells, row], and for each layer values [cells, row], or transposed [width, cells].
    """
    try:
        return _Reader(state, depth).stretch()
    except (struct.error, ValueError):
        return None


class _Reader:
    def __init__(self, state: bytes, depth: int) -> None:
        self.state, self.depth, self.at = state, depth, 0
        self.out = bytearray()

    def stretch(self) -> bytearray:
        *_, streams, cells = self.copy("<IiII", 1)
        meta = np.frombuffer(self.take(cells * CELL.itemsize), CELL)
        if streams != 1 or not cells or (meta["position"] != np.arange(cells)).any() or (meta["sequences"] != 1).any():
            raise ValueError("another layout")
        long = np.zeros(self.depth, CELL)
        long["position"], long["sequences"] = np.arange(self.depth), 1
        self.out += long.tobytes()
        self.cells = cells
        transposed, layers = self.copy("<II")
        for _ in range(layers):
            _, row = self.copy("<iQ")
            self.rows(row)
        for _ in range(layers):
            if not transposed:
                _, row = self.copy("<iQ")
                self.rows(row)
                continue
            _, size, width = self.copy("<iII")
            for _ in range(width):
                self.rows(size)
        if self.at != len(self.state):
            raise ValueError("more than was expected")
        return self.out

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.state):
            raise ValueError("less than was expected")
        self.at += size
        return self.state[self.at - size : self.at]

    def copy(self, layout: str, cells: int = 0) -> tuple[Any, ...]:
        """Read a header and hand it on; with `cells`, its last number becomes the new count of cells."""
        values = struct.unpack(layout, self.take(struct.calcsize(layout)))
        self.out += struct.pack(layout, *((*values[:-1], self.depth) if cells else values))
        return values

    def rows(self, size: int) -> None:
        data = np.frombuffer(self.take(self.cells * size), np.uint8).reshape(self.cells, size)
        self.out += np.resize(data, (self.depth, size)).tobytes()
