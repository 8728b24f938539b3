"""SmoothQuant: outliers of the activations are moved into the weights, so that both fit eight bits better.

Xiao et al. 2022 (arXiv:2211.10438, eq. 4): s = max|x|^a / max|w|^(1-a) for each feature, a = 0.5. Our kernels round
activations by row and group of columns, so an outlier spoils its own group only: there is less to gain here than where
one scale serves a whole row.
"""

from __future__ import annotations

import numpy as np

from hasten.compress.folds import Choices, KnownInputs, New, Read, chain, quantised, scaled, seams
from hasten.compress.methods import Needs
from hasten.graph.graph import Graph

WHOLE = False
NEEDS: Needs = "moments"
STRENGTH = 0.5
KINDS = ("int8", "sparse8")


def fold(graph: Graph, read: Read, inputs: KnownInputs, choices: Choices) -> New:
    new: New = {}
    for seam in seams(graph):
        known = inputs(seam.readers[0])
        if known is None or known.peaks is None or not quantised(seam, choices, KINDS):
            continue
        now = chain(read, new)
        weights = seam.gathered(np.max([np.abs(now(name)).max(axis=0) for name in seam.readers], axis=0))
        activations = seam.gathered(known.peaks)
        used = (weights > 0) & (activations > 0)
        ratio = np.where(used, activations, 1) ** STRENGTH / np.where(used, weights, 1) ** (1 - STRENGTH)
        new |= scaled(seam, now, np.clip(np.where(used, ratio, 1), 1e-4, 1e4).astype(np.float32))
    return new
