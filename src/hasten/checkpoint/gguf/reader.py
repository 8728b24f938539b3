"""Reads a GGUF file's header and hands out its tensors' bytes. The reader believes nothing: every count, length, offset
and size is checked against the file before anything is made of it, and the file is mapped, not read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.checkpoint.files import regular_size
from hasten.checkpoint.gguf.decode import TYPES, UNREAD, Type
from hasten.errors import CheckpointError

VERSIONS = (2, 3)
LARGEST_HEADER = 100_000_000
LARGEST_ARRAY = 1 << 22
MOST_PAIRS, MOST_TENSORS = 1 << 16, 1 << 20
LONGEST_NAME, MOST_DIMENSIONS = 1024, 4
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class Entry:
    """A tensor: `shape` outermost first, its type, and its place in the file."""

    shape: tuple[int, ...]
    type: Type
    begin: int
    nbytes: int


class File:
    """An open GGUF file: `metadata` and `tensors` by name. Arrays of numbers in metadata are NumPy arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = regular_size(path)
        try:
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise CheckpointError(f"{path} does not begin as a GGUF file does")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        self._at = 4
        version = self._number("<u4")
        if version not in VERSIONS:
            other = int.from_bytes(int(version).to_bytes(4, "little"), "big") in VERSIONS
            what = "is in big-endian order" if other else f"has GGUF version {version}"
            raise CheckpointError(f"{path} {what}, read are versions 2 and 3 in little-endian order")
        tensors, pairs = self._count(MOST_TENSORS, "tensors"), self._count(MOST_PAIRS, "key-values")
        self.metadata = self._pairs(pairs)
        self.tensors = self._entries(tensors)

    # --- the header, piece by piece

    def _take(self, size: int) -> int:
        """Where the next `size` bytes begin; they are within the file and the header is not too long."""
        begin = self._at
        if size > self.size - begin:
            raise CheckpointError(
                f"{self.path}: its header asks for {size} bytes at byte {begin}, the file has {self.size}",
                "the file is truncated or damaged",
            )
        if begin + size > LARGEST_HEADER:
            raise CheckpointError(f"{self.path}: its header is longer than {LARGEST_HEADER} bytes")
        self._at = begin + size
        return begin

    def _number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self._map, kind, 1, self._take(kind.itemsize))[0].item()

    def _count(self, most: int, what: str) -> int:
        count = int(self._number("<u8"))
        if count > most:
            raise CheckpointError(f"{self.path}: its header counts {count} {what}, at most {most} are read")
        return count

    def _string(self, longest: int, what: str) -> str:
        size = self._count(longest, f"bytes in {what}")
        begin = self._take(size)
        try:
            return self._map[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 text") from None

    def _pairs(self, count: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(LONGEST_NAME, "a key")
            if key in made:
                raise CheckpointError(f"{self.path}: key '{key[:200]}' is given twice")
            made[key] = self._value(int(self._number("<u4")), key)
        return made

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string(LARGEST_HEADER, f"the value of '{key[:200]}'")
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: key '{key[:200]}' has type {kind}, which GGUF does not have")
        inner, count = int(self._number("<u4")), self._count(LARGEST_ARRAY, f"values of '{key[:200]}'")
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner])
            return np.frombuffer(self._map, dtype, count, self._take(count * dtype.itemsize)).copy()
        if inner != STRING:
            raise CheckpointError(f"{self.path}: key '{key[:200]}' is an array of type {inner}, which is not read")
        return self._strings(count, key)

    def _strings(self, count: int, key: str) -> list[str]:
        """Hundreds of thousands of them: no call for each part of one."""
        lengths, data, at, made = struct.Struct("<Q").unpack_from, self._map, self._at, []
        end = min(self.size, LARGEST_HEADER)
        try:
            for _ in range(count):
                if at + 8 > end or (size := lengths(data, at)[0]) > end - at - 8:
                    self._at = at
                    self._take(end - at + 1)  # says what is wrong
                made.append(data[at + 8 : at + 8 + size].decode("utf-8"))
                at += 8 + size
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: '{key[:200]}' holds a string that is not UTF-8 text") from None
        self._at = at
        return made

    def _entries(self, count: int) -> dict[str, Entry]:
        stated: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string(LONGEST_NAME, "a tensor's name")
            dimensions = int(self._number("<u4"))
            if name in stated or not 1 <= dimensions <= MOST_DIMENSIONS:
                what = "is given twice" if name in stated else f"has {dimensions} dimensions"
                raise CheckpointError(f"{self.path}: tensor '{name[:200]}' {what}")
            shape = tuple(int(self._number("<u8")) for _ in range(dimensions))[::-1]
            stated[name] = (shape, int(self._number("<u4")), int(self._number("<u8")))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}"[:300])
        start = -(-self._at // alignment) * alignment
        made = {name: self._entry(name, *facts, start, alignment) for name, facts in stated.items()}
        end = 0
        for name, entry in sorted(made.items(), key=lambda item: item[1].begin):
            if entry.begin < end:
                raise CheckpointError(f"{self.path}: tensor '{name[:200]}' overlaps another")
            end = entry.begin + entry.nbytes
        return made

    def _entry(self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int, alignment: int) -> Entry:
        where = f"{self.path}: tensor '{name[:200]}'"
        type = TYPES.get(number)
        if type is None:
            raise CheckpointError(
                f"{where} is of type {UNREAD.get(number, number)}, which is not read",
                f"read are: {', '.join(t.name for t in TYPES.values())}; llama-quantize writes any of them",
            )
        count = 1
        for size in shape:
            count *= size
        if min(shape) < 1 or count > 1 << 48 or shape[-1] % type.block:
            raise CheckpointError(f"{where} has shape {list(shape)}, impossible for {type.name}")
        nbytes = count // type.block * type.block_bytes
        if offset % alignment or offset > self.size or nbytes > self.size - start - offset:
            raise CheckpointError(
                f"{where} lies at bytes {start + offset} to {start + offset + nbytes}, the file has {self.size}",
                "the file is truncated or damaged",
            )
        return Entry(shape, type, start + offset, nbytes)

    # --- tensors

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes as they lie: [product of the outer dimensions, bytes of a row]."""
        entry = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.begin)
        return data.reshape(-1, entry.shape[-1] // entry.type.block * entry.type.block_bytes)

    def header(self) -> memoryview:
        """The bytes before the first tensor."""
        return memoryview(self._map)[: self._at]
