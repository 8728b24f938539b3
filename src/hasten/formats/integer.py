"""Integers on a uniform grid, with an f16 scale for each row and group of columns (layout: native/core.h)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
from hasten.formats import _blocks
from hasten.formats._blocks import PANEL, UNIT, UInt8
from hasten.formats.base import Arrays, Float32, Format, Weight
from hasten.formats.dense import aligned, check_values, panel_chunks, repeated


@dataclass(frozen=True)
class Grouped(Format):
    """What formats of codes and group scales share: 8, 4, 3, 2 or 1 bits a weight, value = level(code) * scale."""

    @property
    def bits(self) -> int:
        """Of a code, without its share of the scale."""
        return int(self.kind[-1])

    def groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def array_specs(self, rows: int, columns: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        panels, padded = -(-rows // PANEL), -(-columns // UNIT) * UNIT
        return {
            "codes": (np.dtype(np.uint8), (panels, padded * self.bits // 32, PANEL, 4)),
            "scales": (np.dtype(np.float16), (panels, self.groups(columns), PANEL)),
        }

    def check(self, arrays: Any) -> None:
        exponent = 0x7C00
        if bool(((arrays["scales"].view(np.uint16) & exponent) == exponent).any()):
            raise FormatError(f"{self.name} array 'scales' holds a NaN or an infinity")

    def scales(self, weight: Weight) -> Float32:
        """The stored scales: float32 [rows, groups]."""
        by_row = weight.arrays["scales"].swapaxes(1, 2).reshape(-1, self.groups(weight.shape[1]))
        return by_row[: weight.shape[0]].astype(np.float32)

    def levels(self, weight: Weight) -> npt.NDArray[np.int8]:
        """What scales multiply: int8 [rows, columns]."""
        rows, columns = weight.shape
        out = np.empty((rows, columns), np.int8)
        levels = self._levels(weight.arrays).astype(np.int8)
        for panel0, panel1 in panel_chunks(rows, columns):
            first, last = panel0 * PANEL, min(panel1 * PANEL, rows)
            codes = self._unpack(weight.arrays["codes"][panel0:panel1])
            out[first:last] = levels[codes[: last - first, :columns]]
        return out

    def dense(self, weight: Weight) -> Float32:
        rows, columns = weight.shape
        out = np.empty((rows, columns), np.float32)
        levels, scales = self._levels(weight.arrays), self.scales(weight)
        for panel0, panel1 in panel_chunks(rows, columns):
            first, last = panel0 * PANEL, min(panel1 * PANEL, rows)
            codes = self._unpack(weight.arrays["codes"][panel0:panel1])[: last - first, :columns]
            spread = np.repeat(scales[first:last], self.group, axis=1)[:, :columns]
            np.multiply(levels[codes], spread, out=out[first:last])
        return out

    def pack(self, values: Float32, **parameters: Any) -> Weight:
        """pack(values, scales=None, ...): the code nearest to values / scales, for each value.

        `scales` are float32 [rows, groups], of either sign, and are rounded to f16 first; without them each group's
        extreme becomes a level. Raises FormatError for values that are not finite, scales of a wrong shape or beyond
        f16, and parameters that the format does not have.
        """
        scales: Float32 | None = parameters.pop("scales", None)
        arrays = self._parameter_arrays(parameters)
        rows, columns = check_values(values, self.name)
        groups = self.groups(columns)
        if scales is not None and scales.shape != (rows, groups):
            raise FormatError(f"{self.name} scales are {list(scales.shape)}, must be [{rows}, {groups}]")
        specs = self.array_specs(rows, columns)
        codes = aligned(specs["codes"][1], np.uint8)
        stored = aligned(specs["scales"][1], np.float16)
        for panel0, panel1 in panel_chunks(rows, columns):
            first, last = panel0 * PANEL, min(panel1 * PANEL, rows)
            height = (panel1 - panel0) * PANEL
            block = np.zeros((height, groups * self.group), np.float32)
            block[: last - first, :columns] = values[first:last]
            grouped = block.reshape(height, groups, self.group)
            wanted = np.zeros((height, groups), np.float32)
            wanted[: last - first] = (
                self._absmax(grouped[: last - first], arrays) if scales is None else scales[first:last]
            )
            half = self._to_half(wanted)
            stored[panel0:panel1] = half.reshape(-1, PANEL, groups).swapaxes(1, 2)
            divisor = half.astype(np.float32)
            divisor[divisor == 0] = np.inf  # every level times zero is zero: take the code of zero
            with np.errstate(over="ignore"):
                np.divide(grouped, divisor[:, :, None], out=grouped)
            codes[panel0:panel1] = self._pack(self._nearest(block, arrays)[:, : -(-columns // UNIT) * UNIT])
        return Weight(self, (rows, columns), {"codes": codes, "scales": stored, **arrays})

    def absmax_scales(self, values: Float32, **parameters: Any) -> Float32:
        """The scales [rows, groups] that pack takes when it is given none: each group's extreme is a level."""
        arrays = self._parameter_arrays(parameters)
        rows, columns = check_values(values, self.name)
        padded = np.zeros((rows, self.groups(columns) * self.group), np.float32)
        padded[:, :columns] = values
        return self._absmax(padded.reshape(rows, -1, self.group), arrays)

    def _to_half(self, scales: Float32) -> npt.NDArray[np.float16]:
        with np.errstate(over="ignore", under="ignore"):
            half = scales.astype(np.float16)
        if not bool(np.isfinite(half).all()):
            raise FormatError(
                f"a {self.name} scale is NaN or beyond what f16 holds (65504)", "store this matrix as bf16 or f32"
            )
        return half

    def _pack(self, codes: UInt8) -> UInt8:
        """Codes [height, padded columns] -> as `codes` holds them."""
        return _blocks.pack(codes, self.bits)

    def _unpack(self, packed: UInt8) -> UInt8:
        """The inverse of _pack."""
        return _blocks.unpack(packed, self.bits)

    @abstractmethod
    def _parameter_arrays(self, parameters: dict[str, Any]) -> Arrays:
        """The arrays that hold pack's parameters besides scales; FormatError where one is unknown or impossible."""

    @abstractmethod
    def _absmax(self, grouped: Float32, arrays: Arrays) -> Float32:
        """Scales [rows, groups] for values [rows, groups, group]."""

    @abstractmethod
    def _levels(self, arrays: Arrays) -> Float32:
        """The value of each code where the scale is one."""

    @abstractmethod
    def _nearest(self, quotients: Float32, arrays: Arrays) -> UInt8:
        """The code of the level nearest to each quotient; `quotients` may be overwritten."""

    def random(self, rows: int, columns: int, seed: int) -> Weight:
        rng = np.random.default_rng(seed)
        specs = self.array_specs(rows, columns)
        arrays = self._parameter_arrays({})
        extreme = 3.0 * columns**-0.5 / np.abs(self._levels(arrays)).max()
        scales = repeated((rng.uniform(0.5, 1.0, 65_521) * extreme).astype(np.float16), specs["scales"][1])
        scales.swapaxes(1, 2)[-1, PANEL - (-rows % PANEL) :] = 0
        codes = repeated(self._random_pool(rng), specs["codes"][1])
        return Weight(self, (rows, columns), {"codes": codes, "scales": scales, **arrays})

    def _random_pool(self, rng: np.random.Generator) -> UInt8:
        """Bytes that `codes` may be filled with, over and over."""
        return rng.integers(1, 256, 262_139, np.uint8)


@dataclass(frozen=True)
class Integer(Grouped):
    """value = (code - zero) * scale: int8 with codes 1..255 and zero 128, int4 with zero 8, int3 with zero 4.

    With few levels one that is zero costs more than it gives: int2 has -3, -1, 1, 3 and int1 -1, 1 times the scale.
    """

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def odd(self) -> bool:
        """Whether levels are the odd integers."""
        return self.bits <= 2

    def _parameter_arrays(self, parameters: dict[str, Any]) -> Arrays:
        if parameters:
            raise FormatError(f"{self.name} takes the parameter 'scales', not {sorted(parameters)}")
        return {}

    def _absmax(self, grouped: Float32, arrays: Arrays) -> Float32:
        high: Float32 = grouped.max(axis=2)
        low: Float32 = grouped.min(axis=2)
        if self.bits == 8 or self.odd:
            return np.asarray(np.maximum(high, -low) / (2 * self.zero - 1 if self.odd else 127), np.float32)
        # The grid reaches one step further below zero: the extreme goes there, by the sign of the scale.
        return np.asarray(np.where(high > -low, high, low) / -self.zero, np.float32)

    def _levels(self, arrays: Arrays) -> Float32:
        levels = np.arange(1 << self.bits, dtype=np.float32) - np.float32(self.zero)
        return 2 * levels + 1 if self.odd else levels

    def _nearest(self, quotients: Float32, arrays: Arrays) -> UInt8:
        if self.odd:
            quotients *= np.float32(0.5)
            np.floor(quotients, out=quotients)
        else:
            np.rint(quotients, out=quotients)
        np.clip(quotients, 1 - self.zero if self.bits == 8 else -self.zero, self.zero - 1, out=quotients)
        quotients += np.float32(self.zero)
        return quotients.astype(np.uint8)


KINDS = ("int8", "int4", "int3", "int2", "int1")
FORMATS = {f"{kind}-g{group}": Integer(f"{kind}-g{group}", kind, group) for kind in KINDS for group in (32, 64, 128)}
