"""What every weight format offers."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError

Float32 = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Weight:
    """A packed matrix: `shape` (rows, columns), its format, and the arrays that kernels read and artifacts store."""

    format: Format
    shape: tuple[int, int]
    arrays: Arrays

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    def dense(self) -> Float32:
        """The values the kernels multiply by: float32 [rows, columns]."""
        return self.format.dense(self)


@dataclass(frozen=True)
class Format(ABC):
    """One way to store a matrix. Subclasses are frozen: a format is its name."""

    name: str
    kind: str
    """Name of the native Kind."""
    group: int
    """Columns that share a scale: 32, 64 or 128; 0 where there are none."""

    @abstractmethod
    def array_specs(self, rows: int, columns: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Name -> (dtype, shape) of the arrays of a [rows, columns] matrix: `load` checks them."""

    @abstractmethod
    def pack(self, values: Float32, **parameters: Any) -> Weight:
        """Store values [rows, columns], rounding each to the nearest that the format has."""

    @abstractmethod
    def dense(self, weight: Weight) -> Float32:
        """The inverse of pack, exactly as kernels see it."""

    def load(self, arrays: Mapping[str, npt.NDArray[Any]], shape: tuple[int, int]) -> Weight:
        """Arrays as stored -> Weight, without copying.

        Raises FormatError where an array is missing, is one too many, or has another dtype or shape than it must.
        """
        specs = self.array_specs(*shape)
        if set(arrays) != set(specs):
            raise FormatError(f"{self.name} weight holds arrays {sorted(arrays)}, must hold {sorted(specs)}")
        for name, (dtype, expected) in specs.items():
            found = arrays[name]
            if found.dtype != dtype or found.shape != expected:
                raise FormatError(
                    f"{self.name} array '{name}' is {found.dtype}{list(found.shape)}, must be {dtype}{list(expected)}"
                )
        self.check(arrays)
        return Weight(self, shape, dict(arrays))

    def check(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:  # noqa: B027 - most formats have nothing to check
        """Raise FormatError where stored contents are impossible (scales that are no numbers, codes out of range)."""

    @abstractmethod
    def random(self, rows: int, columns: int, seed: int) -> Weight:
        """A weight of plausible random contents, made without quantising: for benches of shapes without weights."""

    def nbytes(self, rows: int, columns: int) -> int:
        return sum(
            int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for dtype, shape in self.array_specs(rows, columns).values()
        )

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits, scales and padding included, over rows * columns."""
        return self.nbytes(rows, columns) * 8 / (rows * columns)


def _families() -> list[Any]:
    import hasten.formats as package

    return [
        importlib.import_module(f"hasten.formats.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
        if m.name != "base" and not m.name.startswith("_")
    ]


def names() -> list[str]:
    """Every format's name."""
    return [name for family in _families() for name in family.FORMATS]


def get(name: str) -> Format:
    """The format called `name`. Raises FormatError listing those that exist."""
    for family in _families():
        if name in family.FORMATS:
            found: Format = family.FORMATS[name]
            return found
    raise FormatError(f"unknown weight format '{name}'", f"known formats: {', '.join(names())}")
