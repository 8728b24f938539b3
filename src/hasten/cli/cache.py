"""The flags that say how keys and values are kept, and what memory there is for them: the same for every command."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hasten.cli.options import option
from hasten.errors import InputError

SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([kmgt]i?b|b)", re.IGNORECASE | re.ASCII)
UNITS = {
    "b": 1,
    **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1 << 10 * n for n, p in enumerate("kmgt", 1)},
}


@dataclass(frozen=True)
class Cache:
    kv_format: str = option(
        "auto",
        help="keys and values in the cache: bf16, int8 (half of bf16's memory), int4 (about 0.28 of it) or f32, or one "
        "for each layer, between commas; auto: what the artifact was made for, else f32 for f32 weights, else bf16",
        metavar="FORMAT",
    )


@dataclass(frozen=True)
class Room(Cache):
    """Of commands that have a model write."""

    memory: str | None = option(
        None, help="that all of it may take, as 4GiB or 800MiB (default: what is available)", metavar="SIZE"
    )

    @property
    def budget(self) -> int | None:
        """`memory` in bytes. Raises InputError where it is no size."""
        return None if self.memory is None else size_in_bytes(self.memory)


def size_in_bytes(text: str) -> int:
    """Bytes of a size with its unit: "1.5 GiB" -> 1610612736. Raises InputError where it is none."""
    found = SIZE.fullmatch(text.strip())
    count = int(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    if count < 1:
        raise InputError(f"'{text[:40]}' is no size of memory", "give a number and its unit, as 4GiB or 800MiB")
    return count
