"""Losses of cache formats layer by layer, and the choice among them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import cache, feed, native
from hasten.compress import calibrate, kv
from hasten.errors import BackendError, BudgetError
from hasten.evaluate import perplexity

GRAPH = tiny_graph(blocks=3, head_dim=16)


@pytest.fixture(scope="module")
def weights():
    pack = formats.get("f32").pack
    return {n: pack(np.float32(a)) if a.ndim == 2 else np.float32(a) for n, a in random_arrays(GRAPH).items()}


@pytest.fixture(scope="module")
def windows():
    draw = np.random.default_rng(1)
    return [draw.integers(0, GRAPH.vocabulary, n).astype(np.int32) for n in (60, 41)]


@pytest.fixture(scope="module")
def losses(weights, windows):
    return kv.measure(GRAPH, weights, windows, kv_format="f32", threads=1)


def whole(weights, windows, kv_format):
    """Mean KL of the whole model with this cache from the one with f32's, by evaluation."""
    limits = feed.window_limits(64, 64, threads=1, kv_format="f32")
    exact, near = (
        native.compile(GRAPH, weights, feed.window_limits(64, 64, threads=1, kv_format=name))
        for name in (limits.kv_format, kv_format)
    )
    longer = [np.append(w, 0).astype(np.int32) for w in windows]  # every token but the last is fed
    found = perplexity.score(near, longer, exact)
    return found.kl_divergence


def test_each_is_what_the_whole_model_loses(weights, windows, losses):
    assert set(losses) == set(itertools.product(range(3), ("int8", "int4")))
    for (layer, name), loss in losses.items():
        chosen = tuple(name if i == layer else "f32" for i in range(3))
        assert loss == pytest.approx(whole(weights, windows, chosen), rel=1e-3, abs=1e-7)
        assert loss > 0
    for layer in range(3):
        assert losses[layer, "int4"] > 10 * losses[layer, "int8"]


def test_the_final_hidden_states_may_be_given(weights, windows, losses):
    final = calibrate.calibrate(GRAPH, weights, windows, kv_format="f32", threads=1).final
    assert kv.measure(GRAPH, weights, windows, kv_format="f32", final=final, threads=2) == losses


def test_only_what_differs_is_measured(weights, windows):
    mixed = ("int4", "int8", "bf16")
    found = kv.measure(GRAPH, weights, windows[:1], kv_format=mixed, threads=1)
    assert set(found) == {(0, "int8"), (1, "int4"), (2, "int8"), (2, "int4")}


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_there_is(seed):
    draw = np.random.default_rng(seed)
    losses = {
        (layer, name): draw.exponential(scale) for layer in range(3) for name, scale in (("int8", 1), ("int4", 4))
    }
    budget = draw.exponential(4)
    chosen = kv.choose(GRAPH, losses, budget)

    def saved(names):
        return sum(2 * 2 * (32 - {"bf16": 32, "int8": 18, "int4": 12}[name]) for name in names)

    def lost(names):
        return sum(losses.get((layer, name), 0.0) for layer, name in enumerate(names))

    fitting = [names for names in itertools.product(("bf16", "int8", "int4"), repeat=3) if lost(names) <= budget]
    assert lost(chosen) <= budget
    assert saved(chosen) == max(map(saved, fitting))
    assert lost(chosen) == min(lost(names) for names in fitting if saved(names) == saved(chosen))


def test_what_cannot_be_chosen():
    assert kv.choose(GRAPH, {(0, "int4"): float("inf")}, 5.0) == ("bf16",) * 3
    assert kv.choose(GRAPH, {(1, "int4"): 0.5}, 0.0) == ("bf16",) * 3
    assert kv.choose(GRAPH, {(1, "int4"): 0.5}, 0.5) == ("bf16", "int4", "bf16")
    with pytest.raises(BudgetError, match="a budget of -1 nats"):
        kv.choose(GRAPH, {}, -1.0)
    with pytest.raises(BackendError, match="is given for 2 layers, the model has 3"):
        kv.choose(GRAPH, {}, 1.0, ("int8", "int8"))


def test_bytes_saved():
    assert kv.saved_bytes(GRAPH, "bf16", 1, "int4") == 2 * 2 * (32 - 12)
    assert kv.saved_bytes(GRAPH, ("f32", "int8", "int4"), 2, "int8") == 2 * 2 * (12 - 18)
    assert cache.token_bytes("int4", 27) == 14 + 4
