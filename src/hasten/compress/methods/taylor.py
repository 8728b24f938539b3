"""Half of the weights become zero, those without which the loss changes least to first order; the others are integers.

The score of a weight is the mean square of g w, the change of the loss when the weight becomes zero (Molchanov et al.
2019, arXiv:1906.10771, eq. 8), with gradients of the calibration text's loss. It needs torch.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.methods import Float32, Inputs
from hasten.compress.methods.wanda import pruned
from hasten.formats import Format, Weight
from hasten.formats.sparse import Sparse

NEEDS = "gradients"


def supports(format: Format) -> bool:
    return isinstance(format, Sparse)


def apply(values: Float32, format: Format, inputs: Inputs) -> Weight:
    assert inputs.gradients is not None
    scores = np.abs(values) * np.sqrt(inputs.gradients)  # the root ranks alike, and does not overflow
    return pruned(values, scores.astype(np.float32), format, inputs)
