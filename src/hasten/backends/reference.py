"""The reference backend: runs a graph's formulas over one whole sequence, on NumPy, PyTorch or any array API namespace.

In NumPy float64 it is the oracle of the kernels; on PyTorch it is differentiable. No cache, no paging, no speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from hasten.formats.base import Weight
from hasten.graph.functions import Array
from hasten.graph.graph import TOKENS, Graph
from hasten.graph.ops import Span


def forward(
    graph: Graph,
    weights: Mapping[str, Array],
    tokens: Array | None = None,
    *,
    hidden: Array | None = None,
    rows: Array | None = None,
) -> Array:
    """The graph's output, [tokens, vocabulary] logits for a whole model; see `values`."""
    return values(graph, weights, tokens, hidden=hidden, rows=rows)[graph.output]


def values(
    graph: Graph,
    weights: Mapping[str, Array],
    tokens: Array | None = None,
    *,
    hidden: Array | None = None,
    rows: Array | None = None,
    keep: Iterable[str] | None = None,
    upto: str | None = None,
) -> dict[str, Array]:
    """Every value of the graph by name, or only those in `keep`; stops once `upto` is made.

    `weights`: name -> array of one namespace and dtype, in which everything is computed. `tokens` [tokens] are ids from
    position 0, with any leading batch axes; a graph that begins with Input reads `hidden` [tokens, width] instead.
    `rows` [rows]: tokens whose logits are wanted, None for all.
    """
    start = hidden if tokens is None else tokens
    assert start is not None, "tokens or hidden states are needed"
    xp = array_namespace(start)
    length = start.shape[-1] if hidden is None else start.shape[-2]
    span = Span(xp.arange(length, device=device(start)), rows, hidden)
    made: dict[str, Array] = {TOKENS: tokens}
    for node in graph.nodes:
        inputs = tuple(made[v] for v in node.inputs)
        outputs = node.op.formula(inputs, tuple(weights[w] for w in node.weights), span)
        made.update(zip(node.outputs, outputs, strict=True))
        if upto in node.outputs:
            break
    del made[TOKENS]
    return made if keep is None else {name: made[name] for name in keep}


def dense_weights(weights: Mapping[str, Weight | npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float64]]:
    """What a backend was given, as the float64 arrays that its kernels should multiply by."""
    return {
        name: (weight.dense() if isinstance(weight, Weight) else weight).astype(np.float64)
        for name, weight in weights.items()
    }
