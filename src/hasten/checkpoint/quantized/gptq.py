"""GPTQ as AutoGPTQ and GPTQModel write it (Frantar et al., arXiv:2210.17323): of 2, 3, 4 or 8 bits.

qweight int32 [in * bits / 32, out]: a column of it is a stream of bits, input 0 lowest.
qzeros  int32 [groups, out * bits / 32]: a row of it is such a stream; in checkpoint_format "gptq" each zero point is
        stored less one, modulo 2^bits, in "gptq_v2" as it is.
scales  [groups, out]; g_idx int32 [in]: each input's group, for activation order (absent: in order).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.checkpoint.grid import Grid
from hasten.checkpoint.quantized.packed import Parts, integer, unpack, words
from hasten.errors import CheckpointError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)


def marks(found: Mapping[str, Any]) -> bool:
    return "qweight" in found


def check(quantization: Mapping[str, Any]) -> None:
    layout = quantization.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"config.json: GPTQ weights of checkpoint_format {layout!r} are not read"[:200],
            "read are: gptq, gptq_v2; save the checkpoint as one of these",
        )
    if quantization.get("pack_dtype", "int32") != "int32":
        raise CheckpointError("config.json: GPTQ weights are read where pack_dtype is int32")
    integer(quantization, "bits")
    integer(quantization, "group_size")


def read(name: str, parts: Parts, shape: tuple[int, int], quantization: Mapping[str, Any]) -> Grid:
    rows, columns = shape
    stored = parts.shape("qweight")
    # Bits are told by the shape: single layers may have others than the config's.
    bits = next((b for b in BITS if stored == (words(columns, b), rows)), None)
    if bits is None or columns * bits % 32 or rows * bits % 32:
        raise parts.fail(f"qweight of {list(stored)} is no GPTQ matrix of [{rows}, {columns}] with 2, 3, 4 or 8 bits")
    by_group, dense = parts.floats("scales")
    if by_group.ndim != 2 or by_group.shape[1] != rows or not 0 < by_group.shape[0] <= columns:
        raise parts.fail(f"scales are {list(by_group.shape)}, must be [groups, {rows}]")
    groups = by_group.shape[0]
    packed = parts.array("qzeros", ("I32",), (groups, words(rows, bits)))
    zeros = unpack(packed, bits, rows).T.astype(np.int16)  # [rows, groups]
    if quantization.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) % (1 << bits)
    group, group_of = _groups(parts, columns, groups, integer(quantization, "group_size"))

    def levels() -> Any:
        codes = unpack(parts.array("qweight", ("I32",)).T, bits, columns).astype(np.int16)
        of = np.arange(columns) // group if group_of is None else group_of
        codes -= zeros[:, of]
        return codes

    low, high = -int(zeros.max()), (1 << bits) - 1 - int(zeros.min())
    scales = np.ascontiguousarray(by_group.T)
    return Grid(name, shape, levels, low, high, scales, group, dense, group_of)


def _groups(parts: Parts, columns: int, groups: int, stated: int | None) -> tuple[int, Any]:
    """(columns of a group, group of each column or None where they stand in order)."""
    group = columns if groups == 1 else -(-columns // groups)
    if stated is not None and stated > 0 and -(-columns // stated) == groups:
        group = stated
    if "g_idx" not in parts:
        return group, None
    found = parts.array("g_idx", ("I32", "I64"), (columns,)).astype(np.int64)
    if found.min() < 0 or found.max() >= groups:
        raise parts.fail(f"g_idx names group {found.max() if found.max() >= groups else found.min()} of {groups}")
    return group, None if np.array_equal(found, np.arange(columns) // group) else found
