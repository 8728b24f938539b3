"""Reader and writer of safetensors files (https://github.com/huggingface/safetensors#format).

A file is: length of the header (8 bytes, little-endian), header (JSON: name -> dtype, shape, data_offsets), data.
The reader believes nothing: every offset is checked before the file is mapped. bf16 has no NumPy dtype and is handed
out as uint16.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.checkpoint.files import parse_object, regular_size
from hasten.errors import CheckpointError

LARGEST_HEADER = 100_000_000  # as the reference implementation
ALIGNMENT = 64
PADDING = "padding."
"""Tensors of this name fill the space before an aligned one: the format allows no gaps."""

NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
BYTES = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()} | {"F8_E4M3": 1, "F8_E5M2": 1}
NAMES = {np.dtype(dtype): name for name, dtype in NUMPY.items() if name != "BF16"}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class File:
    """An open safetensors file: `tensors` by name, `array` maps one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = regular_size(path)
        try:
            with open(path, "rb") as file:
                self.tensors, self.metadata = self._header(file.read(8), file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    def _header(self, prefix: bytes, file: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        if len(prefix) < 8:
            raise CheckpointError(f"{self.path} has {self.size} bytes, too few for a safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > min(LARGEST_HEADER, self.size - 8):
            raise CheckpointError(
                f"{self.path} states a header of {length} bytes, but has {self.size - 8} left"
                if length > self.size - 8
                else f"{self.path} states a header of {length} bytes, more than {LARGEST_HEADER}",
                "the file is truncated or no safetensors file",
            )
        header = parse_object(file.read(length), f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__ must map names to strings")
        try:
            "".join(header).encode()
        except UnicodeEncodeError:  # JSON can spell it, and no error that names it could be printed
            raise CheckpointError(f"{self.path}: a tensor's name holds half of a surrogate pair") from None
        tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
        at = 8 + length
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin != at:
                raise CheckpointError(
                    f"{self.path}: tensor '{name[:200]}' begins at byte {tensor.begin}, must begin at {at}: "
                    "tensors overlap or leave a gap"
                )
            at = tensor.end
        if at != self.size:
            raise CheckpointError(
                f"{self.path} has {self.size} bytes, its header speaks of {at}", "the file is truncated or damaged"
            )
        return tensors, metadata

    def _tensor(self, name: str, entry: object, start: int) -> Tensor:
        def fail(reason: str) -> CheckpointError:
            return CheckpointError(f"{self.path}: tensor '{name[:200]}' {reason}")

        def counts(value: object) -> bool:
            return isinstance(value, list) and all(
                isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value
            )

        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise fail("must have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise fail(f"has unknown dtype {dtype!r}")
        if not counts(shape) or len(shape) > 8:
            raise fail(f"has shape {shape!r}"[:200])
        if not counts(offsets) or len(offsets) != 2:
            raise fail(f"has data_offsets {offsets!r}"[:200])
        needed = BYTES[dtype]
        for n in shape:
            needed *= n
        if offsets[1] - offsets[0] != needed:
            raise fail(f"is {dtype}{shape} and needs {needed} bytes, its offsets give {offsets[1] - offsets[0]}")
        return Tensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor, memory-mapped and read-only."""
        tensor = self.tensors[name]
        if tensor.dtype not in NUMPY:
            raise CheckpointError(f"{self.path}: tensor '{name}' is {tensor.dtype}, which hasten does not read")
        dtype = np.dtype(NUMPY[tensor.dtype])
        count = (tensor.end - tensor.begin) // dtype.itemsize
        if count == 0:
            return np.empty(tensor.shape, dtype)
        return np.frombuffer(self._map, dtype, count, tensor.begin).reshape(tensor.shape)


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """F32, F16 or BF16 as float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def layout(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """(length prefix and header, size of the whole file) of a file that `write` would make."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, array in arrays.items():
        end = at + array.nbytes
        entries[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, end]}
        gap = -end % ALIGNMENT
        if gap:
            entries[f"{PADDING}{len(entries)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        at = end + gap
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header, 8 + len(header) + at


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> str:
    """Write arrays, each aligned to 64 bytes in the file, and wait until they are on disk. Returns the SHA-256."""
    header, _ = layout(arrays, metadata or {})
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(header)
        for array in arrays.values():
            if array.nbytes:
                put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            put(b"\0" * (-array.nbytes % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
