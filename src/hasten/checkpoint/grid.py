"""A matrix of small integers with scales, whoever wrote it, and the format of ours that holds exactly its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import formats
from hasten.errors import CheckpointError, FormatError
from hasten.formats.base import Float32, Weight
from hasten.formats.integer import Grouped

Int16 = npt.NDArray[np.int16]
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Grid:
    """value[i, j] = levels[i, j] * scales[i, group of j].

    `levels()` reads them: int16 [rows, columns], zero points taken off, within `low` and `high`. Columns share a scale
    `group` at a time, or as `group_of` [columns] says. `dense` is the format that takes values which no integer format
    of ours holds: the type in which the kernels of the file's own format compute them.
    """

    name: str
    shape: tuple[int, int]
    levels: Callable[[], Int16]
    low: int
    high: int
    scales: Float32  # [rows, groups]
    group: int
    dense: str
    group_of: npt.NDArray[np.int64] | None = None
    decided: str | None = None
    """`format`, where it has been found out before: to find it may take reading all levels."""

    def __post_init__(self) -> None:
        rows, columns = self.shape
        groups = -(-columns // self.group)
        if self.group_of is not None:
            groups = self.scales.shape[1]
            if self.group_of.shape != (columns,) or self.group_of.min() < 0 or self.group_of.max() >= groups:
                raise CheckpointError(f"{self.name}: columns belong to groups that do not exist")
        if self.scales.shape != (rows, groups):
            raise CheckpointError(f"{self.name}: scales are {list(self.scales.shape)}, must be [{rows}, {groups}]")
        if not bool(np.isfinite(self.scales).all()):
            raise CheckpointError(f"{self.name}: a scale is NaN or infinite", "the checkpoint is damaged")

    @cached_property
    def format(self) -> str:
        """The smallest of our formats that holds every value as it is, else `dense`."""
        if self.decided is not None:
            return self.decided
        group = self._group()
        with np.errstate(over="ignore", under="ignore"):
            half = self.scales.astype(np.float16).astype(np.float32)
        kind = self._kind()
        if group is None or kind is None or not np.array_equal(half, self.scales):
            return self.dense
        return f"{kind}-g{group}"

    @property
    def is_exact(self) -> bool:
        return self.format != self.dense

    def _group(self) -> int | None:
        """The largest group of ours that divides those of the file."""
        columns = self.shape[1]
        if self.group_of is not None:
            return None
        if self.group >= columns and self.group not in GROUPS:
            return GROUPS[0]
        return next((g for g in GROUPS if self.group % g == 0), None)

    def _kind(self) -> str | None:
        low, high = self._range
        span = high - low + 1
        for bits in (1, 2, 3, 4):
            if bits >= 3 and low >= -(1 << bits - 1) and high < 1 << bits - 1:
                return f"int{bits}"
            if span <= 1 << bits and low >= -64 and low + (1 << bits) - 1 <= 63:
                return f"codebook{bits}"
        return "int8" if low >= -127 and high <= 127 else None

    @cached_property
    def _range(self) -> tuple[int, int]:
        """What the levels are within: as promised, or counted where that decides whether int8 holds them."""
        if self.low >= -127 and self.high <= 127:
            return self.low, self.high
        levels = self.levels()
        return int(levels.min()), int(levels.max())

    def rows(self, rows: tuple[int, int] | None) -> Grid:
        """A part of it, cut out of a fused tensor."""
        if rows is None:
            return self
        first, last = rows
        return replace(
            self,
            shape=(last - first, self.shape[1]),
            levels=lambda: self.levels()[first:last],
            scales=self.scales[first:last],
        )

    def values(self) -> Float32:
        """float32 [rows, columns]: exact, as a level of 9 bits times a scale of 11 is."""
        out: Float32 = self.levels().astype(np.float32)
        if self.group_of is not None:
            spread = self.scales[:, self.group_of]
        else:
            spread = np.repeat(self.scales, self.group, axis=1)[:, : self.shape[1]]
        with np.errstate(over="ignore"):
            out *= spread
        if not bool(np.isfinite(out.sum(dtype=np.float64))):
            raise CheckpointError(f"{self.name} holds values beyond what float32 holds", "the checkpoint is damaged")
        return out

    def weight(self) -> Weight:
        """The matrix in `format`. Raises CheckpointError where that is 16 bits wide and does not hold a value."""
        try:
            return self._packed()
        except FormatError as error:
            raise CheckpointError(f"{self.name}: {error.message}", error.hint) from None

    def _packed(self) -> Weight:
        chosen = formats.get(self.format)
        if not self.is_exact:
            return chosen.pack(self.values())
        groups = -(-self.shape[1] // chosen.group)
        if self.group >= self.shape[1]:
            scales = np.repeat(self.scales[:, :1], groups, axis=1)
        else:
            scales = np.repeat(self.scales, self.group // chosen.group, axis=1)[:, :groups]
        parameters: dict[str, Any] = {}
        if self.format.startswith("codebook"):
            bits = int(self.format[len("codebook")])
            parameters["codebook"] = np.arange(self._range[0], self._range[0] + (1 << bits))
        return chosen.pack(self.values(), scales=scales, **parameters)


def levels_of(weight: Weight) -> tuple[npt.NDArray[np.int8], Float32]:
    """The other way: a packed matrix as int8 levels [rows, columns] and float32 scales [rows, groups], exactly.

    Only for formats with group scales.
    """
    assert isinstance(weight.format, Grouped), weight.format.name
    return weight.format.levels(weight), weight.format.scales(weight)
