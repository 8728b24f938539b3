"""A cache format for each layer: the right one also in parts of a model, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from programs import batch, limits, pack
from support import random_arrays, tiny_graph

from hasten.backends import cache, native
from hasten.engine import memory
from hasten.errors import BackendError
from hasten.graph.fuse import fuse

MIXED = ("int4", "f32", "int8")
TOKENS = np.arange(40) % 50


@pytest.fixture(scope="module")
def model():
    graph = tiny_graph(blocks=3, head_dim=16)
    return graph, pack(graph, random_arrays(graph))


def test_parts_of_a_model_keep_their_layers_formats(model):
    graph, _ = model
    assert cache.formats_of(graph, MIXED) == MIXED
    assert cache.formats_of(fuse(graph), MIXED) == MIXED
    assert [cache.formats_of(graph.block(i), MIXED) for i in range(3)] == [("int4",), ("f32",), ("int8",)]
    assert cache.formats_of(fuse(graph.tail(1)), MIXED) == ("f32", "int8")
    assert cache.formats_of(graph.tail(1).tail(1), MIXED) == ("int8",)
    assert cache.formats_of(graph.tail(1).block(0), MIXED) == ("f32",)
    assert cache.formats_of(graph.tail(3), MIXED) == ()
    assert cache.formats_of(graph.tail(1), "int8") == ("int8", "int8")


@pytest.mark.parametrize("wrong", [(), MIXED[:2], (*MIXED, "f32")])
def test_another_number_of_layers_is_refused(model, wrong):
    with pytest.raises(BackendError, match=f"a cache format is given for {len(wrong)} layers, the model has 3"):
        cache.formats_of(model[0], wrong)


def test_a_part_needs_its_own_layers_format(model):
    with pytest.raises(BackendError, match="a cache format is given for 2 layers, the model has more"):
        cache.formats_of(model[0].tail(2), MIXED[:2])


def test_a_block_alone_has_the_bits_that_it_has_in_the_model(model):
    graph, weights = model
    sizes = limits(kv_format=MIXED)
    values = [b.input for b in graph.blocks] + [b.output for b in graph.blocks]
    whole = native.compile(graph, weights, sizes, keep=values).step(batch(TOKENS))
    logits = whole.logits()
    for i, block in enumerate(graph.blocks):
        own = {name: weights[name] for name in graph.block(i).weights}
        given = batch(TOKENS, hidden=whole.value(block.input))
        alone = native.compile(graph.block(i), own, sizes, keep=[block.output]).step(given)
        np.testing.assert_array_equal(alone.value(block.output), whole.value(block.output))
        own = {name: weights[name] for name in graph.tail(i).weights}
        np.testing.assert_array_equal(native.compile(graph.tail(i), own, sizes).step(given).logits(), logits)


def test_each_layer_is_rounded_as_if_it_were_alone(model):
    """Rounding one layer's cache moves the logits; each format differs, and a mixture is none of them."""
    graph, weights = model
    chosen = ["f32", ("int4", "f32", "f32"), ("f32", "int4", "f32"), ("f32", "f32", "int8"), MIXED, "int4"]
    found = [native.compile(graph, weights, limits(kv_format=kv)).step(batch(TOKENS)).logits() for kv in chosen]
    assert len({f.tobytes() for f in found}) == len(found)
    for logits in found[1:]:
        np.testing.assert_allclose(logits, found[0], atol=0.2 * np.abs(found[0]).max())


def test_memory_is_the_sum_of_the_layers(model):
    graph, weights = model
    sizes = limits(kv_format=MIXED)
    taken = native.compile(graph, weights, sizes).memory()["kv_cache"]
    tokens = sizes.kv_blocks * sizes.block_size
    assert taken == tokens * 2 * 2 * ((8 + 4) + 4 * 16 + (16 + 2))  # keys and values, heads, of each layer
    assert taken == tokens * memory.kv_bytes(graph, MIXED)


def test_heads_too_wide_for_int4_are_refused():
    graph = tiny_graph(heads=1, kv_heads=1, head_dim=1026)
    weights = pack(graph, random_arrays(graph))
    with pytest.raises(BackendError, match="heads of 1026 features; int4 takes 1024"):
        native.compile(graph, weights, limits(kv_format="int4"))
    native.compile(graph, weights, replace(limits(), kv_format="int8"))
