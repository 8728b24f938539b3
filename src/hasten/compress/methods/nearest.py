"""Rounding to the nearest: each group's extreme is a level, everything else goes to the level beside it."""

from __future__ import annotations

from hasten.compress.methods import Float32, Inputs
from hasten.formats import Format, Weight

NEEDS = "nothing"


def supports(format: Format) -> bool:
    return True


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    return format.pack(values)
