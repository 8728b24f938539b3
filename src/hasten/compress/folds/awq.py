"""AWQ: features with large inputs are scaled up before rounding, so that their weights lose less.

Lin et al. 2023 (arXiv:2306.00978): s = mean(|x|)^a, with a from a grid of 20 that leaves the least error at the output
of the linears that read the features. That error is exact here, by second moments, not of a sample of inputs.
"""

from __future__ import annotations

import numpy as np

from hasten import formats
from hasten.compress.folds import Choices, Float32, KnownInputs, New, Read, Seam, chain, quantised, scaled, seams
from hasten.compress.methods import Inputs, Needs
from hasten.compress.methods._sweep import loss
from hasten.graph.graph import Graph

WHOLE = False
NEEDS: Needs = "hessian"
GRID = 20
KINDS = ("int4", "int3", "int2", "int1", "codebook")
"""Eight bits lose too little to be worth it."""


def fold(graph: Graph, read: Read, inputs: KnownInputs, choices: Choices) -> New:
    new: New = {}
    for seam in seams(graph):
        known = inputs(seam.readers[0])
        if known is None or known.magnitudes is None or not quantised(seam, choices, KINDS):
            continue
        scales = search(seam, chain(read, new), known, choices)
        if (scales != 1).any():
            new |= scaled(seam, chain(read, new), scales)
    return new


def search(seam: Seam, read: Read, inputs: Inputs, choices: Choices) -> Float32:
    """The scales [rows of before] of the least error, ones where none is better."""
    assert inputs.magnitudes is not None
    assert inputs.hessian is not None
    size = np.maximum(seam.gathered(inputs.magnitudes), 1e-8)
    best, least = np.ones_like(size), np.inf
    for step in range(GRID):
        scales = size ** np.float32(step / GRID)
        scales = np.clip(scales / np.sqrt(scales.max() * scales.min()), 1e-4, 1e4).astype(np.float32)
        columns, error = seam.spread(scales), 0.0
        for name in seam.readers:
            values = read(name)
            rounded = formats.get(choices[name].format).pack(values * columns).dense() / columns
            error += float(loss(rounded - values, inputs.hessian).sum())
        if error < least:
            best, least = scales, error
    return best
