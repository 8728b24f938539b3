"""compressed-tensors, as llm-compressor writes it: pack-quantized (int2 to int8) and int-quantized (int8).

pack-quantized: weight_packed int32 [out, in * bits / 32], each row a stream of bits of code + 2^(bits-1);
weight_scale [out, groups] (one group: by channel; [1]: by tensor); weight_zero_point int32 [out * bits / 32, groups],
packed along the output; weight_g_idx [in] for activation order; weight_shape. int-quantized: weight int8 [out, in] and
weight_zero_point int8 [out, groups]. How activations were to be rounded is not imitated: ours are by row and group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.checkpoint.grid import Grid
from hasten.checkpoint.quantized.packed import Parts, unpack, words
from hasten.errors import CheckpointError
from hasten.formats.base import Float32

PARTS = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    *("input_scale", "input_zero_point"),
)
LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")


def marks(found: Mapping[str, Any]) -> bool:
    return "weight_packed" in found or "weight_scale" in found


def check(quantization: Mapping[str, Any]) -> None:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise CheckpointError("config.json: quantization_config has no config_groups")
    for layout in (quantization.get("format"), *(g.get("format") for g in groups.values())):
        if layout is not None and layout not in LAYOUTS:
            raise CheckpointError(
                f"config.json: compressed-tensors of format {layout!r} is not read"[:200],
                f"read are: {', '.join(LAYOUTS)}",
            )
    for entry in groups.values():
        weights = entry.get("weights")
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int" or bits not in range(2, 9):
            raise CheckpointError(f"config.json: compressed-tensors with weights {weights!r} is not read"[:300])
    sparsity = quantization.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"config.json: compressed-tensors with sparsity {sparsity.get('format')!r} is not read")
    transform = quantization.get("transform_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        raise CheckpointError("config.json: compressed-tensors with transforms (transform_config) is not read")


def read(name: str, parts: Parts, shape: tuple[int, int], quantization: Mapping[str, Any]) -> Grid:
    rows, columns = shape
    scales, dense = _scales(parts, shape)
    groups = scales.shape[1]
    group, group_of = _groups(parts, columns, groups, _stated(quantization, "group_size"))
    if "weight_packed" in parts:
        bits = _bits(parts, shape, quantization)
        offset = 1 << (bits - 1)

        def codes() -> Any:
            found = unpack(parts.array("weight_packed", ("I32",)), bits, columns).astype(np.int16)
            found -= offset
            return found
    else:
        bits = 8
        parts.array("weight", ("I8",), shape)

        def codes() -> Any:
            return parts.array("weight", ("I8",)).astype(np.int16)

    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if "weight_zero_point" not in parts:
        return Grid(name, shape, codes, low, high, scales, group, dense, group_of)
    zeros = _zeros(parts, rows, groups, bits)

    def levels() -> Any:
        found = codes()
        found -= zeros[:, np.arange(columns) // group if group_of is None else group_of]
        return found

    low, high = low - int(zeros.max()), high - int(zeros.min())
    return Grid(name, shape, levels, low, high, scales, group, dense, group_of)


def _scales(parts: Parts, shape: tuple[int, int]) -> tuple[Float32, str]:
    scales, dense = parts.floats("weight_scale")
    rows, columns = shape
    if scales.size == 1:  # one for the whole matrix
        scales = np.repeat(scales.reshape(1, 1), rows, axis=0)
    elif scales.ndim == 1:
        scales = scales[:, None]
    if scales.ndim != 2 or scales.shape[0] != rows or not 0 < scales.shape[1] <= columns:
        raise parts.fail(f"weight_scale is {list(parts.shape('weight_scale'))}, must be [{rows}, groups]")
    return scales, dense


def _stated(quantization: Mapping[str, Any], field: str) -> set[int]:
    """What the groups of the config say of `field`, whichever of them a matrix belongs to."""
    found = (entry["weights"].get(field) for entry in quantization["config_groups"].values())
    return {value for value in found if type(value) is int and value > 0}


def _bits(parts: Parts, shape: tuple[int, int], quantization: Mapping[str, Any]) -> int:
    stored = parts.shape("weight_packed")
    fitting = [b for b in _stated(quantization, "num_bits") if stored == (shape[0], words(shape[1], b))]
    if len(fitting) != 1:
        raise parts.fail(f"weight_packed of {list(stored)} is no matrix of {list(shape)} with the bits of config.json")
    if "weight_shape" in parts:
        stated = parts.array("weight_shape", ("I64", "I32"), (2,))
        if tuple(int(n) for n in stated) != shape:
            raise parts.fail(f"weight_shape says {stated.tolist()}, config.json asks for {list(shape)}")
    return fitting[0]


def _groups(parts: Parts, columns: int, groups: int, stated: set[int]) -> tuple[int, Any]:
    fitting = [g for g in stated if -(-columns // g) == groups]
    group = columns if groups == 1 else fitting[0] if len(fitting) == 1 else -(-columns // groups)
    if "weight_g_idx" not in parts:
        return group, None
    found = parts.array("weight_g_idx", ("I32", "I64"), (columns,)).astype(np.int64)
    if bool((found == -1).all()):  # made and never filled
        return group, None
    if found.min() < 0 or found.max() >= groups:
        raise parts.fail(f"weight_g_idx names a group that is none of {groups}")
    return group, None if np.array_equal(found, np.arange(columns) // group) else found


def _zeros(parts: Parts, rows: int, groups: int, bits: int) -> Any:
    """int16 [rows, groups]."""
    if parts.dtype("weight_zero_point") == "I8":
        stored = parts.array("weight_zero_point", ("I8",)).astype(np.int16)
        if stored.size == 1:
            return np.full((rows, groups), stored.reshape(-1)[0])
        if stored.size != rows * groups:
            raise parts.fail(f"weight_zero_point is {list(stored.shape)}, must be [{rows}, {groups}]")
        return stored.reshape(rows, groups)
    packed = parts.array("weight_zero_point", ("I32",), (words(rows, bits), groups))
    return unpack(packed.T, bits, rows).T.astype(np.int16) - (1 << (bits - 1))
