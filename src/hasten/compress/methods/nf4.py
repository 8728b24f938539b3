"""The fixed levels of NF4, with searched group scales (Dettmers et al. 2023, arXiv:2305.14314, appendix E).

The same construction for three bits; two bits and one have evenly spaced levels. See formats/codebook.py.
"""

from __future__ import annotations

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods.codebook import fitted
from hasten.formats import Format, Weight
from hasten.formats.codebook import DEFAULTS, Codebook

NEEDS = "moments"


def supports(format: Format) -> bool:
    return isinstance(format, Codebook)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    assert isinstance(format, Codebook)
    levels = DEFAULTS[format.bits]
    return format.pack(values, scales=fitted(values, levels, format.group, inputs.moments), codebook=levels)
