"""Half of the weights become zero, those that matter least at the layer's output; the others are clipped integers.

In each block of the format the weights are ranked by m_j w_j^2, where m_j is the mean square of input feature j: the
squared score of Wanda (Sun et al. 2023, arXiv:2306.11695), compared within blocks of 16 rows rather than within a row.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Moments
from hasten.compress.methods.clip import best
from hasten.formats import Format, Weight
from hasten.formats.sparse import larger_half


def supports(format: Format) -> bool:
    return format.kind == "sparse8"


def apply(values: Float32, format: Format, moments: Moments | None = None) -> Weight:
    size = np.sqrt(moments, dtype=np.float32) if moments is not None and moments.any() else np.float32(1)
    kept = larger_half(np.abs(values) * size, values)
    return format.pack(kept, scales=best(kept, "int8", format.group, moments))
