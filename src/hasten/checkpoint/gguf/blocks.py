"""How GGUF stores numbers: f32, f16, bf16, and blocks of 32 (ggml's quantize_row_q8_0_ref and _q4_0_ref)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.errors import CheckpointError
from hasten.formats.base import Float32

BLOCK = 32
CHUNK = 1 << 22  # numbers encoded at a time: each passes through several arrays as large
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """A type of tensor: ggml's number for it, the number of a file that is mostly of it, and its blocks."""

    name: str
    tensor_type: int
    file_type: int
    block: int
    """Numbers in a block."""
    block_bytes: int

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * columns // self.block * self.block_bytes


KINDS = {
    kind.name: kind
    for kind in (
        Kind("f32", 0, 0, 1, 4),
        Kind("f16", 1, 1, 1, 2),
        Kind("q4_0", 2, 2, BLOCK, 18),
        Kind("q8_0", 8, 7, BLOCK, 34),
        Kind("bf16", 30, 32, 1, 2),
    )
}


def encode(values: Float32, kind: Kind, name: str = "a tensor") -> UInt8:
    """float32 [rows, columns] (or [n]) as the bytes of `kind`; columns are a multiple of its block.

    Raises CheckpointError naming the tensor where its values, or its scales, are beyond what f16 holds.
    """
    out = np.empty(kind.nbytes(1, values.size), np.uint8)
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, values.size, CHUNK):
        with np.errstate(over="ignore", under="ignore"):
            encoded = ENCODERS[kind.name](flat[start : start + CHUNK])
        if encoded is None:
            raise CheckpointError(f"tensor '{name}' has values beyond what {kind.name} holds", "write the model as f32")
        begin = kind.nbytes(1, start)
        out[begin : begin + encoded.size] = encoded
    return out


def _f32(values: Float32) -> UInt8:
    return np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)


def _bf16(values: Float32) -> UInt8:
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").reshape(-1).view(np.uint8)


def _f16(values: Float32) -> UInt8 | None:
    half = values.astype("<f2")
    return half.reshape(-1).view(np.uint8) if bool(np.isfinite(half).all()) else None


def _q8_0(values: Float32) -> UInt8 | None:
    """A block: f16 d = max|x| / 127, then 32 of int8 round(x / d), halves away from zero."""
    blocks = values.reshape(-1, BLOCK)  # [blocks, 32]
    scale = np.abs(blocks).max(axis=1) / np.float32(127)  # [blocks]
    scaled = blocks * _inverse(scale)[:, None]
    codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled).astype(np.int8)
    return _joined(scale, codes.view(np.uint8))


def _q4_0(values: Float32) -> UInt8 | None:
    """A block: f16 d = m / -8 with m the value farthest from zero, then min(15, int(x / d + 8.5)); two a byte, the
    first half of the block in the low bits."""
    blocks = values.reshape(-1, BLOCK)  # [blocks, 32]
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    scale = farthest / np.float32(-8)  # [blocks]
    codes = np.minimum((blocks * _inverse(scale)[:, None] + np.float32(8.5)).astype(np.int8), 15).astype(np.uint8)
    return _joined(scale, codes[:, :16] | codes[:, 16:] << np.uint8(4))


def _inverse(scale: Float32) -> Float32:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _joined(scale: Float32, codes: UInt8) -> UInt8 | None:
    half = scale.astype("<f2")
    if not bool(np.isfinite(half).all()):
        return None
    return np.concatenate((half[:, None].view(np.uint8), codes), axis=1).reshape(-1)


def encode_levels(levels: npt.NDArray[np.int8], scales: Float32, kind: Kind) -> UInt8:
    """int8 levels [rows, columns] and f16 scales [rows, columns / 32], held as float32, as q4_0 or q8_0: no rounding.

    Levels are within -8 and 7 for q4_0.
    """
    blocks = levels.reshape(-1, BLOCK)
    if kind.name == "q8_0":
        codes = blocks.view(np.uint8)
    else:
        nibbles = (blocks + np.int8(8)).astype(np.uint8)
        codes = nibbles[:, :16] | nibbles[:, 16:] << np.uint8(4)
    half = np.ascontiguousarray(scales.reshape(-1, 1), "<f2")
    return np.concatenate((half.view(np.uint8), codes), axis=1).reshape(-1)


ENCODERS = {"f32": _f32, "f16": _f16, "bf16": _bf16, "q8_0": _q8_0, "q4_0": _q4_0}
