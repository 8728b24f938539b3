"""Half of the weights become zero, those whose product with their input is smallest; the others are clipped integers.

Sun et al. 2023 (arXiv:2306.11695): weights are ranked by |w| ||x||_2, here within each block of the format rather than
within each row.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods.clip import best
from hasten.formats import Format, Weight
from hasten.formats.sparse import Sparse, larger_half

NEEDS = "moments"


def supports(format: Format) -> bool:
    return isinstance(format, Sparse)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    moments = inputs.moments
    size = np.sqrt(moments, dtype=np.float32) if moments is not None and moments.any() else np.float32(1)
    return pruned(values, np.abs(values) * size, format, inputs)


def pruned(values: Float32, scores: Float32, format: Format, inputs: Inputs) -> Weight:
    """The half with the larger scores [out, in] kept, as clipped integers."""
    kept = larger_half(scores, values)
    return format.pack(kept, scales=best(kept, "int8", format.group, inputs.moments))
