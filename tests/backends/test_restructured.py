"""Restructured graphs on the native backend, against formulas in float64: every block may have a shape of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import TOKENS_OF, batch, limits, pack
from structures import structures
from support import random_arrays, tiny_graph

from hasten.backends import native, reference
from hasten.graph.structure import LowRank, Narrow, Structure, restructured

NAMES = [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("q", "k", "v", "o", "gate", "up", "down")]
MIXED = Structure(
    (1,),
    {0: Narrow(2, 1, 33), 2: Narrow(2, 2)},
    {
        "blocks.0.q.weight": LowRank(5, True),
        "blocks.0.v.weight": LowRank(3),
        "blocks.0.down.weight": LowRank(17),
        "blocks.2.o.weight": LowRank(7, True),
        "blocks.2.up.weight": LowRank(20, True),
        "head.weight": LowRank(9),
    },
)


@given(structures(3, 4, 2, 40, NAMES), st.sampled_from([{}, {"bias": True, "head_norms": True}, {"post_norms": True}]))
@settings(max_examples=25, deadline=None)
def test_float_weights_give_the_formulas(structure: Structure, options: dict[str, bool]) -> None:
    graph = restructured(tiny_graph(blocks=3, **options), structure)
    weights = pack(graph, random_arrays(graph))
    found = native.compile(graph, weights, limits()).step(batch(TOKENS_OF)).logits()
    expected = reference.forward(graph, reference.dense_weights(weights), TOKENS_OF)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kv_format", ["f32", "int8"])
def test_chunks_and_steps_give_what_the_whole_gives(kv_format: str) -> None:
    """So the cache's slots, each of another width, are told apart."""
    graph = restructured(tiny_graph(blocks=3, tied=False), MIXED)
    formats = dict.fromkeys(graph.weights, "int8-g32") | {"blocks.0.q.weight": "int4-g32", "head.weight.left": "bf16"}
    weights = pack(graph, random_arrays(graph), formats)
    whole = native.compile(graph, weights, limits(kv_format=kv_format)).step(batch(TOKENS_OF)).logits()
    program = native.compile(graph, weights, limits(kv_format=kv_format))
    parts = [program.step(batch(TOKENS_OF[a:b], a)).logits() for a, b in ((0, 17), (17, 39), (39, 40))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
