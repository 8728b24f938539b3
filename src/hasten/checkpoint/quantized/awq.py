"""AWQ as AutoAWQ writes it (Lin et al., arXiv:2306.00978), version "gemm": 4 bits, packed along the output.

qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]. Eight neighbours of a row share a
word; the k-th lowest four bits are those of neighbour 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.checkpoint.grid import Grid
from hasten.checkpoint.quantized.packed import Parts, UInt8, integer, unpack
from hasten.errors import CheckpointError

PARTS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS, PER_WORD = 4, 8


def marks(found: Mapping[str, Any]) -> bool:
    return "qweight" in found


def check(quantization: Mapping[str, Any]) -> None:
    version = str(quantization.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(
            f"config.json: AWQ weights of version '{version[:80]}' are not read", "read is: gemm, AutoAWQ's default"
        )
    bits = integer(quantization, "bits", "w_bit")
    if bits not in (None, BITS):
        raise CheckpointError(f"config.json: AWQ weights of {bits} bits are not read, only of {BITS}")
    integer(quantization, "group_size", "q_group_size")


def read(name: str, parts: Parts, shape: tuple[int, int], quantization: Mapping[str, Any]) -> Grid:
    rows, columns = shape
    if rows % PER_WORD:
        raise parts.fail(f"{rows} rows are no multiple of {PER_WORD}")
    packed = (columns, rows // PER_WORD)
    if parts.shape("qweight") != packed:
        raise parts.fail(f"qweight has shape {list(parts.shape('qweight'))}, must be {list(packed)}")
    by_group, dense = parts.floats("scales")
    if by_group.ndim != 2 or by_group.shape[1] != rows or by_group.shape[0] == 0 or columns % by_group.shape[0]:
        raise parts.fail(
            f"scales are {list(by_group.shape)}, must be [groups, {rows}] with groups that divide {columns}"
        )
    groups = by_group.shape[0]
    group = columns // groups
    stated = integer(quantization, "group_size", "q_group_size")
    if stated is not None and group != (columns if stated <= 0 else stated):
        raise parts.fail(f"{groups} groups of {columns} columns are not groups of {stated}, as config.json says")
    zeros = _neighbours(parts.array("qzeros", ("I32",), (groups, rows // PER_WORD))).T.astype(np.int16)

    def levels() -> Any:
        codes = _neighbours(parts.array("qweight", ("I32",), packed)).T.astype(np.int16, order="C")
        codes.reshape(rows, groups, group)[:] -= zeros[:, :, None]
        return codes

    low, high = -int(zeros.max()), (1 << BITS) - 1 - int(zeros.min())
    return Grid(name, shape, levels, low, high, np.ascontiguousarray(by_group.T), group, dense)


def _neighbours(words: Any) -> UInt8:
    """int32 [n, words] -> [n, words * 8] in the order of the outputs."""
    nibbles = unpack(words, BITS, words.shape[1] * PER_WORD).reshape(words.shape[0], -1, PER_WORD)
    found = np.empty_like(nibbles)
    found[:, :, list(ORDER)] = nibbles
    return found.reshape(words.shape[0], -1)
