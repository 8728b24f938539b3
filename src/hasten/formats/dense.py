"""Dense weights: f32, f16 and bf16, in panels of 16 rows (layout: native/core.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
from hasten.formats.base import Float32, Format, Weight

PANEL = 16
LINE = 64
CHUNK = 1 << 21
"""Values handled at a time: temporaries stay in the cache, whatever the matrix."""


@dataclass(frozen=True)
class Dense(Format):
    """Every value as it is, rounded to the nearest (ties to even) where 16 bits hold it."""

    def array_specs(self, rows: int, columns: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        panels = -(-rows // PANEL)
        if self.kind == "f32":
            return {"codes": (np.dtype(np.float32), (panels, columns, PANEL))}
        return {"codes": (np.dtype(np.uint16), (panels, -(-columns // 2), PANEL, 2))}

    def check(self, arrays: Any) -> None:
        exponent = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[self.kind]
        codes = arrays["codes"].reshape(-1).view(np.uint32 if self.kind == "f32" else np.uint16)
        for start in range(0, codes.size, CHUNK):
            if int((codes[start : start + CHUNK] & codes.dtype.type(exponent)).max()) == exponent:
                raise FormatError(f"{self.name} array 'codes' holds a NaN or an infinity")

    def pack(self, values: Float32, **parameters: Any) -> Weight:
        """Raises FormatError for values that are not finite, or too large for f16 or bf16."""
        if parameters:
            raise FormatError(f"{self.name} takes no parameters, got {sorted(parameters)}")
        rows, columns = check_values(values, self.name)
        lanes = 1 if self.kind == "f32" else 2
        dtype, shape = self.array_specs(rows, columns)["codes"]
        codes = aligned(shape, dtype)
        for panel0, panel1 in panel_chunks(rows, columns):
            block = values[panel0 * PANEL : panel1 * PANEL]
            padded = np.zeros(((panel1 - panel0) * PANEL, shape[1] * lanes), dtype)
            padded[: len(block), :columns] = self._encode(block)
            unit = padded.view(np.uint32)  # one lane's columns move together: [rows, shape[1]]
            moved = unit.reshape(panel1 - panel0, PANEL, shape[1]).swapaxes(1, 2)
            codes[panel0:panel1].view(np.uint32).reshape(moved.shape)[:] = moved
        return Weight(self, (rows, columns), {"codes": codes})

    def dense(self, weight: Weight) -> Float32:
        rows, columns = weight.shape
        codes = weight.arrays["codes"]
        out = np.empty((rows, columns), np.float32)
        for panel0, panel1 in panel_chunks(rows, columns):
            block = np.ascontiguousarray(codes[panel0:panel1].swapaxes(1, 2)).reshape((panel1 - panel0) * PANEL, -1)
            out[panel0 * PANEL : panel1 * PANEL] = self._decode(block)[: rows - panel0 * PANEL, :columns]
        return out

    def random(self, rows: int, columns: int, seed: int) -> Weight:
        pool = np.random.default_rng(seed).standard_normal(65_521, np.float32) * np.float32(columns**-0.5)
        dtype, shape = self.array_specs(rows, columns)["codes"]
        codes = repeated(self._encode(pool).astype(dtype), shape)
        by_row = codes.swapaxes(1, 2)  # [panels, 16, columns or pairs, (2)]
        by_row[-1, PANEL - (-rows % PANEL) :] = 0
        if codes.ndim == 4 and columns % 2:
            codes[:, -1, :, 1] = 0
        return Weight(self, (rows, columns), {"codes": codes})

    def _encode(self, values: Float32) -> npt.NDArray[Any]:
        if self.kind == "f32":
            return values
        if self.kind == "f16":
            with np.errstate(over="ignore", under="ignore"):
                bits = values.astype(np.float16).view(np.uint16)
        else:
            wide = values.view(np.uint32)
            bits = ((wide + (((wide >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        exponent = 0x7C00 if self.kind == "f16" else 0x7F80
        if bool(((bits & exponent) == exponent).any()):
            raise FormatError(f"a value is too large for {self.name}", "use bf16 or f32 for this matrix")
        return bits

    def _decode(self, codes: npt.NDArray[Any]) -> Float32:
        if self.kind == "f32":
            return codes
        if self.kind == "f16":
            return codes.view(np.float16).astype(np.float32)
        return (codes.astype(np.uint32) << 16).view(np.float32)


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros that starts on a cache line, so that kernels' loads never straddle two."""
    count, size = int(np.prod(shape, dtype=np.int64)), np.dtype(dtype).itemsize
    memory = np.zeros(count * size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + count * size].view(dtype).reshape(shape)


def repeated(pool: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An aligned array filled with the pool, over and over."""
    out = aligned(shape, pool.dtype)
    flat = out.reshape(-1)
    whole = flat.size // pool.size * pool.size
    flat[:whole].reshape(-1, pool.size)[:] = pool
    flat[whole:] = pool[: flat.size - whole]
    return out


def check_values(values: npt.NDArray[Any], name: str) -> tuple[int, int]:
    """(rows, columns) of a matrix that can be packed; FormatError where it is none, or holds NaN or infinity."""
    if values.ndim != 2 or values.dtype != np.float32 or 0 in values.shape:
        raise FormatError(f"{name} packs a float32 matrix [rows, columns], got {values.dtype}{list(values.shape)}")
    with np.errstate(all="ignore"):
        total = values.sum(dtype=np.float64)  # NaN or infinite exactly when a value is: no pass over a mask
    if not np.isfinite(total):
        raise FormatError(f"{name} cannot hold values that are NaN or infinite")
    return int(values.shape[0]), int(values.shape[1])


def panel_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of panels that hold about CHUNK values each."""
    panels = -(-rows // PANEL)
    step = max(1, CHUNK // (PANEL * columns))
    return [(start, min(start + step, panels)) for start in range(0, panels, step)]


FORMATS = {name: Dense(name, name, 0) for name in ("f32", "f16", "bf16")}
