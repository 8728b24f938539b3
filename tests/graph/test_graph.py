"""Widths, rows, and cutting a graph into blocks."""

from dataclasses import replace

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten.backends import reference
from hasten.errors import ConfigError
from hasten.graph.graph import TOKENS, GraphBuilder
from hasten.graph.ops import Attention, Linear

IDS = np.array([4, 1, 49, 7, 0, 7])


def test_widths_are_those_of_the_arrays():
    graph = tiny_graph(bias=True, head_norms=True, post_norms=True)
    made = reference.values(graph, random_arrays(graph), IDS)
    assert graph.widths() == {name: value.shape[-1] for name, value in made.items()}


def test_a_weight_that_contradicts_its_node_is_refused_by_name():
    graph = tiny_graph()
    spec = graph.weights["blocks.1.down.weight"]
    weights = {**graph.weights, spec.name: replace(spec, shape=(24, 39))}
    with pytest.raises(ConfigError, match=r"^blocks\.1\.down: linear's weight shapes: .*must be \(\(24, 40\),\)"):
        replace(graph, weights=weights).widths()


def test_rows_are_what_follows_select_rows():
    assert tiny_graph().row_values() == {"rows", "norm", "logits"}


def test_uses_count_every_reading_and_the_output():
    uses = tiny_graph().uses()
    assert uses["blocks.0.attention_norm"] == 3  # q, k, v
    assert uses["blocks.0.out"] == 2  # norm and residual
    assert uses["logits"] == 1


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_block_alone_makes_what_it_makes_in_the_model(index):
    graph = tiny_graph(blocks=3)
    weights = random_arrays(graph)
    made = reference.values(graph, weights, IDS)
    block, place = graph.block(index), graph.blocks[index]
    alone = reference.values(block, weights, hidden=made[place.input])
    assert block.output == place.output
    assert set(alone) == {place.input, *(n.outputs[0] for n in graph.nodes[place.start : place.stop])}
    for name, value in alone.items():
        np.testing.assert_array_equal(value, made[name])
    assert block.nodes[block.blocks[0].start].inputs == (place.input,)
    assert [n.op.layer for n in block.nodes if isinstance(n.op, Attention)] == [0]
    assert set(block.weights) == {w for w in graph.weights if w.startswith(f"blocks.{index}.")}


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_tail_ends_in_the_models_logits(index):
    graph = tiny_graph(blocks=3)
    weights = random_arrays(graph)
    made = reference.values(graph, weights, IDS)
    entry = graph.blocks[index].input if index < 3 else graph.blocks[-1].output
    tail = graph.tail(index)
    np.testing.assert_array_equal(reference.forward(tail, weights, hidden=made[entry]), made["logits"])
    assert [n.op.layer for n in tail.nodes if isinstance(n.op, Attention)] == list(range(3 - index))
    for block, whole in zip(tail.blocks, graph.blocks[index:], strict=True):
        assert [n.name for n in tail.nodes[block.start : block.stop]] == [
            n.name for n in graph.nodes[whole.start : whole.stop]
        ]


def test_a_tied_head_is_one_weight():
    tied, untied = tiny_graph(tied=True), tiny_graph(tied=False)
    assert untied.parameters() - tied.parameters() == 50 * 24
    assert [w.name for w in tied.matrices()].count("embed.weight") == 1
    assert all(w.is_matrix for w in tied.matrices())


def test_the_builder_refuses_two_values_or_weights_of_one_name():
    builder = GraphBuilder(context=8, vocabulary=5, hidden=4)
    weight = builder.weight("w", 5, 4)
    assert builder.weight("w", 5, 4) == weight
    with pytest.raises(AssertionError, match="declared twice"):
        builder.weight("w", 4, 5)
    builder.add(Linear(), "a", TOKENS, weights=(weight,))
    with pytest.raises(AssertionError, match="a"):
        builder.add(Linear(), "a", TOKENS, weights=(weight,))
