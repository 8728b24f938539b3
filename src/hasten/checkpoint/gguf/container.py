"""The container, version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Little-endian: magic, version, counts; key-values; tensor names with dimensions, type and offset; then the tensors, each
at a multiple of 32 bytes. Dimensions are written innermost first.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.checkpoint.gguf.blocks import Kind
from hasten.errors import OutputError

VERSION = 3
ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
Value = bool | int | float | str | list[str] | list[int] | list[float]
"""Integers are written as uint32, in lists as int32; floats as float32."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to be: `data` is called once, when its turn comes, and hands out its encoded bytes."""

    shape: tuple[int, ...]
    kind: Kind
    data: Callable[[], npt.NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        return self.kind.nbytes(int(np.prod(self.shape[:-1], dtype=np.int64)), self.shape[-1])


def write(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write the file beside `path` and rename it. Raises OutputError where that fails; nothing is left then."""
    staging = path.with_name(path.name + ".part")
    report = progress or (lambda stage, done, total: None)
    try:
        with open(staging, "wb") as file:
            head = header(metadata, tensors)
            file.write(head + _padding(len(head)))
            for done, (name, tensor) in enumerate(tensors.items()):
                report(f"writing {path.name}", done, len(tensors))
                data = tensor.data()
                assert data.nbytes == tensor.nbytes, name
                file.write(data.data)
                file.write(_padding(data.nbytes))
            report(f"writing {path.name}", len(tensors), len(tensors))
        os.replace(staging, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()


def header(metadata: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        number, encoded = _value(value)
        parts += [_string(key), struct.pack("<I", number), encoded]
    offset = 0
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]
        parts += [_string(name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", tensor.kind.tensor_type, offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    return b"".join(parts)


def _value(value: Any) -> tuple[int, bytes]:
    """(number of the type, bytes)."""
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, _string(value)
    kind = type(value[0]) if value else str  # merges, of a vocabulary of bytes
    number, pack = ELEMENTS[kind]
    return ARRAY, struct.pack("<IQ", number, len(value)) + b"".join(map(pack, value))


def _int32(value: int) -> bytes:
    return struct.pack("<i", value)


def _float32(value: float) -> bytes:
    return struct.pack("<f", value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


ELEMENTS: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    str: (STRING, _string),
    int: (INT32, _int32),
    float: (FLOAT32, _float32),
}


def _padding(size: int) -> bytes:
    return b"\0" * (-size % ALIGNMENT)
