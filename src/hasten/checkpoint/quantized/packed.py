"""What the methods share: their tensors with dtype and shape checked, and small integers packed into 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.checkpoint import safetensors
from hasten.errors import CheckpointError
from hasten.formats.base import Float32

UInt8 = npt.NDArray[np.uint8]
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Parts:
    """The tensors of one matrix by the ends of their names."""

    name: str
    found: Mapping[str, tuple[safetensors.File, str]]

    def __contains__(self, part: str) -> bool:
        return part in self.found

    def dtype(self, part: str) -> str:
        file, stored = self._where(part)
        return file.tensors[stored].dtype

    def shape(self, part: str) -> tuple[int, ...]:
        file, stored = self._where(part)
        return file.tensors[stored].shape

    def array(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        """The tensor as it lies on disk. Raises CheckpointError for another dtype or shape."""
        file, stored = self._where(part)
        found = file.tensors[stored]
        if found.dtype not in dtypes:
            raise CheckpointError(f"{self.name}.{part} is {found.dtype}, must be {' or '.join(dtypes)}")
        if shape is not None and found.shape != shape:
            raise CheckpointError(f"{self.name}.{part} has shape {list(found.shape)}, must be {list(shape)}")
        return file.array(stored)

    def floats(self, part: str) -> tuple[Float32, str]:
        """(float32, the format that has the type it is stored in)."""
        values = self.array(part, tuple(FLOATS))
        return safetensors.to_float32(values, self.dtype(part)), FLOATS[self.dtype(part)]

    def _where(self, part: str) -> tuple[safetensors.File, str]:
        if part not in self.found:
            raise CheckpointError(f"{self.name}.{part} is missing from the weights", "the download is incomplete")
        return self.found[part]

    def fail(self, reason: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.name}: {reason}", hint)


def unpack(words: npt.NDArray[Any], bits: int, count: int) -> UInt8:
    """int32 [rows, words] -> [rows, count]: number i begins at bit bits * i of its row, words joined low to high."""
    rows = words.shape[0]
    data = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, -1)
    if bits == 8:
        return data[:, :count]
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        found = data[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
        return found.reshape(rows, -1)[:, :count]
    flat = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits].reshape(rows, count, bits)
    return np.packbits(flat, axis=2, bitorder="little")[:, :, 0]


def pack(codes: UInt8, bits: int) -> npt.NDArray[np.int32]:
    """The inverse of unpack, for 4 and 8 bits: [rows, count] -> [rows, ceil(count * bits / 32)]."""
    per_word = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // per_word) * per_word), np.uint8)
    padded[:, : codes.shape[1]] = codes
    if bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(padded).view("<i4")


def words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def integer(quantization: Mapping[str, Any], name: str, *others: str) -> int | None:
    """A whole number under any of these names; None where there is none. Raises CheckpointError for another type."""
    for key in (name, *others):
        value = quantization.get(key)
        if value is not None:
            if type(value) is not int or not -1 <= value <= 1 << 20:
                raise CheckpointError(f"config.json: quantization_config has {key} {value!r}"[:200])
            return value
    return None
