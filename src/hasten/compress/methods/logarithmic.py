"""Levels whose sizes form a geometric series, with searched group scales (Miyashita et al. 2016, arXiv:1603.01025).

Half of the levels are negative. Each size is the one before divided by the same ratio, sqrt(2) for four bits and 2 for
fewer, rounded to the whole numbers that a codebook holds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods.codebook import fitted
from hasten.formats import Format, Weight
from hasten.formats.codebook import Codebook

NEEDS = "moments"
LARGEST = 63


def supports(format: Format) -> bool:
    return isinstance(format, Codebook)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    assert isinstance(format, Codebook)
    levels = grid(format.bits)
    return format.pack(values, scales=fitted(values, levels, format.group, inputs.moments), codebook=levels)


def grid(bits: int) -> npt.NDArray[np.int8]:
    """Ascending, int8 [2^bits]."""
    ratio = 2**0.5 if bits == 4 else 2.0
    sizes = np.rint(LARGEST * ratio ** -np.arange(1 << (bits - 1)))
    return np.concatenate([-sizes, sizes[::-1]]).astype(np.int8)
