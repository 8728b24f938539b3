"""What a GGUF file's blocks stand for (ggml's block_q4_0 to block_q6_K in ggml-common.h, and their dequantize_row_*).

A type that is a grid - one scale a block, and integers - gives levels and scales; any type gives float32 values, in the
order of operations of ggml, so that they are its values bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.formats.base import Float32

UInt8 = npt.NDArray[np.uint8]
Int16 = npt.NDArray[np.int16]
Decoder = Callable[[UInt8], Float32]
Levels = Callable[[UInt8], Int16]
LOW_HIGH = np.array([0, 4], np.uint8)[:, None]
PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
BITS = np.arange(8, dtype=np.uint8)[:, None]
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)


@dataclass(frozen=True)
class Type:
    """A type of tensor: `block` numbers in `block_bytes` bytes.

    `levels` of blocks [n, block_bytes] -> int16 [n, block], within `low` and `high`, times the block's f16 scale, which
    stands first; None where blocks are more than that. `values` -> float32 [n, block].
    """

    name: str
    block: int
    block_bytes: int
    values: Decoder
    dense: str = "f16"
    levels: Levels | None = None
    low: int = 0
    high: int = 0


def half(blocks: UInt8, at: int) -> Float32:
    """The f16 at byte `at` of each block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: UInt8) -> UInt8:
    """[n, bytes] -> [n, 2 * bytes]: all low halves of a byte, then all high ones."""
    return np.concatenate((codes & np.uint8(15), codes >> np.uint8(4)), axis=1)


def _fifth_bits(blocks: UInt8, at: int) -> UInt8:
    """32 bits from byte `at`, each as 16 or 0: [n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: UInt8) -> Int16:
    return _nibbles(blocks[:, 2:]).astype(np.int16) - np.int16(8)


def _q5_0(blocks: UInt8) -> Int16:
    return (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.int16) - np.int16(16)


def _q8_0(blocks: UInt8) -> Int16:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.int16)


def _iq4_nl(blocks: UInt8) -> Int16:
    return IQ4[_nibbles(blocks[:, 2:])]


def _grid(levels: Levels) -> Decoder:
    return lambda blocks: levels(blocks).astype(np.float32) * half(blocks, 0)


def _q4_1(blocks: UInt8) -> Float32:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * half(blocks, 0) + half(blocks, 2)


def _q5_1(blocks: UInt8) -> Float32:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes.astype(np.float32) * half(blocks, 0) + half(blocks, 2)


def _planes(bytes: UInt8, width: int, shifts: UInt8, mask: int) -> UInt8:
    """[n, m * width] -> [n, m * len(shifts) * width]: each stretch of `width` bytes once for every shift of it."""
    stretches = bytes.reshape(len(bytes), -1, 1, width) >> shifts
    return (stretches & np.uint8(mask)).reshape(len(bytes), -1)


def _scaled(codes: Any, scales: Float32, minima: Float32 | None = None) -> Float32:
    """[n, 256] codes, [n, groups] scales and minima -> scales * codes - minima."""
    groups = codes.reshape(len(codes), scales.shape[1], -1).astype(np.float32)
    groups *= scales[:, :, None]
    if minima is not None:
        groups -= minima[:, :, None]
    return np.asarray(groups.reshape(len(codes), -1))


def _q2_k(blocks: UInt8) -> Float32:
    """Scales and minima of 4 bits (16 bytes), 2-bit codes (64), d, dmin: 16 groups of 16."""
    codes = _planes(blocks[:, 16:80], 32, PAIRS, 3)
    scales = half(blocks, 80) * (blocks[:, :16] & np.uint8(15)).astype(np.float32)
    return _scaled(codes, scales, half(blocks, 82) * (blocks[:, :16] >> np.uint8(4)).astype(np.float32))


def _q3_k(blocks: UInt8) -> Float32:
    """High bits (32 bytes; set: nothing is taken off), low two bits (64), 6-bit scales (12), d: 16 groups of 16."""
    low = _planes(blocks[:, 32:96], 32, PAIRS, 3).astype(np.int8)
    high = _planes(blocks[:, :32], 32, BITS, 1).astype(np.int8)
    packed = blocks[:, 96:108]
    fours = np.concatenate((packed[:, :8] & np.uint8(15), packed[:, :8] >> np.uint8(4)), axis=1)  # [n, 16]
    twos = _planes(packed[:, 8:], 4, PAIRS, 3)  # [n, 16]
    scales = (fours | twos << np.uint8(4)).astype(np.int8) - np.int8(32)
    return _scaled(low - 4 * (1 - high), half(blocks, 108) * scales.astype(np.float32))


def _k_scales(blocks: UInt8) -> tuple[Float32, Float32]:
    """Q4_K's and Q5_K's: d, dmin, then 8 scales and 8 minima of 6 bits in 12 bytes -> both [n, 8], as float32."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate((first & np.uint8(63), third & np.uint8(15) | first >> np.uint8(6) << np.uint8(4)), axis=1)
    minima = np.concatenate(
        (second & np.uint8(63), third >> np.uint8(4) | second >> np.uint8(6) << np.uint8(4)), axis=1
    )
    return half(blocks, 0) * scales.astype(np.float32), half(blocks, 2) * minima.astype(np.float32)


def _q4_k(blocks: UInt8) -> Float32:
    return _scaled(_planes(blocks[:, 16:], 32, LOW_HIGH, 15), *_k_scales(blocks))


def _q5_k(blocks: UInt8) -> Float32:
    high = _planes(blocks[:, 16:48], 32, BITS, 1)
    return _scaled(_planes(blocks[:, 48:], 32, LOW_HIGH, 15) | high << np.uint8(4), *_k_scales(blocks))


def _q6_k(blocks: UInt8) -> Float32:
    """Low four bits (128 bytes), high two (64), int8 scales (16), d: 16 groups of 16."""
    low = _planes(blocks[:, :128], 64, LOW_HIGH, 15)
    high = _planes(blocks[:, 128:192], 32, PAIRS, 3)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _scaled((low | high << np.uint8(4)).astype(np.int8) - np.int8(32), half(blocks, 208) * scales)


def _iq4_xs(blocks: UInt8) -> Float32:
    """d, high two bits of 8 scales (2 bytes), low four (4), codes (128): 8 groups of 32."""
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2").astype(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack((blocks[:, 4:8] & np.uint8(15), blocks[:, 4:8] >> np.uint8(4)), axis=2).reshape(len(blocks), 8)
    scales = (low | (high & np.uint16(3)).astype(np.uint8) << np.uint8(4)).astype(np.int8) - np.int8(32)
    codes = IQ4[_planes(blocks[:, 8:], 16, LOW_HIGH, 15)]
    return _scaled(codes, half(blocks, 0) * scales.astype(np.float32))


def _f32(blocks: UInt8) -> Float32:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: UInt8) -> Float32:
    return half(blocks, 0)


def _bf16(blocks: UInt8) -> Float32:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


TYPES = {
    0: Type("F32", 1, 4, _f32, "f32"),
    1: Type("F16", 1, 2, _f16),
    2: Type("Q4_0", 32, 18, _grid(_q4_0), levels=_q4_0, low=-8, high=7),
    3: Type("Q4_1", 32, 20, _q4_1),
    6: Type("Q5_0", 32, 22, _grid(_q5_0), levels=_q5_0, low=-16, high=15),
    7: Type("Q5_1", 32, 24, _q5_1),
    8: Type("Q8_0", 32, 34, _grid(_q8_0), levels=_q8_0, low=-128, high=127),
    10: Type("Q2_K", 256, 84, _q2_k),
    11: Type("Q3_K", 256, 110, _q3_k),
    12: Type("Q4_K", 256, 144, _q4_k),
    13: Type("Q5_K", 256, 176, _q5_k),
    14: Type("Q6_K", 256, 210, _q6_k),
    20: Type("IQ4_NL", 32, 18, _grid(_iq4_nl), levels=_iq4_nl, low=-127, high=113),
    23: Type("IQ4_XS", 256, 136, _iq4_xs),
    30: Type("BF16", 1, 2, _bf16, "bf16"),
}
"""ggml's number of a type -> the type."""
UNREAD = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""Types that are named when they are refused."""
