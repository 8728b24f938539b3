"""Blocks chosen by what numpy says of the reference backend's hidden states and logits."""

from __future__ import annotations

import numpy as np
import pytest
from programs import pack
from support import random_arrays, tiny_graph

from hasten.backends import reference
from hasten.compress import calibrate
from hasten.compress.structures import blocks
from hasten.errors import InputError
from hasten.graph.functions import softmax
from hasten.graph.structure import Structure, restructured

COUNT = 4
WINDOWS = [np.random.default_rng(i).integers(0, 50, 30 + i).astype(np.int32) for i in range(3)]


def made():
    """A graph whose block 2 does next to nothing, and whose block 1 hardly turns but lengthens what comes in."""
    graph = tiny_graph(blocks=COUNT)
    arrays = random_arrays(graph)
    for part in ("o", "down"):
        arrays[f"blocks.2.{part}.weight"] *= 0.02
        arrays[f"blocks.0.{part}.weight"] *= 0.3
    return graph, pack(graph, arrays)


def kl(graph, weights, dropped):
    """Mean over tokens, in float64."""
    dense = reference.dense_weights(weights)
    left = restructured(graph, Structure(dropped))
    found = []
    for window in WINDOWS:
        p, q = (softmax(reference.forward(g, dense, window)) for g in (graph, left))
        found.append((p * (np.log(p) - np.log(q))).sum(axis=1))
    return float(np.concatenate(found).mean())


def test_losses_are_what_the_formulas_say() -> None:
    graph, weights = made()
    limits = calibrate.limits_for(WINDOWS, "f32")
    final = [
        reference.values(graph, reference.dense_weights(weights), w)[graph.blocks[-1].output].astype(np.float32)
        for w in WINDOWS
    ]
    found = blocks.losses(graph, weights, WINDOWS, limits, final)
    np.testing.assert_allclose(found, [kl(graph, weights, (i,)) for i in range(COUNT)], rtol=1e-3)


def test_influences_are_what_the_formulas_say() -> None:
    graph, weights = made()
    values = [reference.values(graph, reference.dense_weights(weights), w) for w in WINDOWS]
    expected = []
    for block in graph.blocks:
        x, y = (np.concatenate([v[name] for v in values]) for name in (block.input, block.output))
        cosines = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        expected.append(1 - cosines.mean())
    found = blocks.influences(graph, weights, WINDOWS, calibrate.limits_for(WINDOWS, "f32"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("by", ["similarity", "loss"])
def test_the_least_missed_go_one_after_another(by: str) -> None:
    graph, weights = made()
    assert blocks.choose(graph, weights, WINDOWS, 1, by, kv_format="f32") == [2]
    two = blocks.choose(graph, weights, WINDOWS, 2, by, kv_format="f32")
    assert two == blocks.choose(graph, weights, WINDOWS, 2, by, kv_format="f32")
    if by == "loss":
        assert two == min(([2, i] if i > 2 else [i, 2] for i in (0, 1, 3)), key=lambda p: kl(graph, weights, tuple(p)))
    assert blocks.restructure(graph, lambda _: np.zeros(0), {}, two) == (Structure(tuple(two)), {})


@pytest.mark.parametrize("count", [0, 4, 5])
def test_one_must_stay(count: int) -> None:
    graph, weights = made()
    with pytest.raises(InputError, match=f"{count} blocks cannot be dropped, the model has 4"):
        blocks.choose(graph, weights, WINDOWS, count, "loss", kv_format="f32")


def test_hidden_states_of_zero_are_like_nothing() -> None:
    assert blocks.influence([np.zeros((2, 3), np.float32)], [np.ones((2, 3), np.float32)]) == 1.0
