"""Half of the weights become zero, the smallest; the others are integers with each group's extreme as a level."""

from __future__ import annotations

from hasten.compress.methods import Float32, Inputs
from hasten.formats import Format, Weight
from hasten.formats.sparse import Sparse

NEEDS = "nothing"


def supports(format: Format) -> bool:
    return isinstance(format, Sparse)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    return format.pack(values)  # the format itself keeps the larger half
