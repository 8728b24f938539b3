"""Fusion changes how many nodes there are and nothing else."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import graphs
from support import random_arrays, tiny_graph

from hasten.backends import reference
from hasten.graph.fuse import fuse
from hasten.graph.graph import TOKENS, GraphBuilder
from hasten.graph.ops import (
    Add,
    Attention,
    Embed,
    FusedAttention,
    FusedLinear,
    FusedNorm,
    Gate,
    Linear,
    Norm,
    Rope,
)

IDS = np.array([4, 1, 3, 2, 0, 3])


def plain_parts(op):
    """The ops that a fused op stands for."""
    match op:
        case FusedLinear():
            linears = [Linear(bias) for bias in op.biases]
            return [op.norm] * bool(op.norm) + linears + [Gate(op.gate)] * bool(op.gate) + [Add()] * op.residual
        case FusedAttention():
            ropes = [op.rope, replace(op.rope, heads=op.attention.kv_heads)] if op.rope else []
            return [n for n in (op.q_norm, op.k_norm) if n] + ropes + [op.attention]
        case FusedNorm():
            return [op.norm, Add()]
        case _:
            return [op]


def ops(graph):
    return [type(n.op).__name__ for n in graph.nodes]


@given(graphs(), st.data())
def test_any_graph_computes_the_same_and_keeps_every_op_once(graph, data):
    names = list(graph.widths())
    keep = data.draw(st.sets(st.sampled_from(names), max_size=3))
    fused = fuse(graph, keep)

    assert Counter(p for n in fused.nodes for p in plain_parts(n.op)) == Counter(n.op for n in graph.nodes)
    assert Counter(w for n in fused.nodes for w in n.weights) == Counter(w for n in graph.nodes for w in n.weights)

    weights = random_arrays(graph)
    made, expected = reference.values(fused, weights, IDS), reference.values(graph, weights, IDS)
    assert keep | {graph.output} <= set(made)
    for name, value in made.items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("bias", [False, True])
def test_a_llama_block_becomes_five_nodes(bias):
    fused = fuse(tiny_graph(blocks=3, bias=bias))
    block = fused.blocks[1]
    q, attention, o, gate, down = fused.nodes[block.start : block.stop]
    assert q.op == FusedLinear(Norm(), (bias,) * 3)
    assert q.outputs == ("blocks.1.q", "blocks.1.k", "blocks.1.v")
    assert q.weights[0] == "blocks.1.attention_norm.weight"
    assert isinstance(attention.op, FusedAttention)
    assert attention.op.rope
    assert o.op == down.op == FusedLinear(None, (False,), residual=True)
    assert o.inputs == ("blocks.1.attention", "blocks.0.out")
    assert gate.op == FusedLinear(Norm(), (False, False), gate="silu")
    assert down.outputs == ("blocks.1.out",)
    assert ops(fused)[-2:] == ["SelectRows", "FusedLinear"]


def test_head_norms_join_attention():
    fused = fuse(tiny_graph(head_norms=True))
    (first, _) = (n for n in fused.nodes if isinstance(n.op, FusedAttention))
    assert (first.op.q_norm, first.op.k_norm) == (Norm(heads=4), Norm(heads=2))
    assert first.weights == ("blocks.0.q_norm.weight", "blocks.0.k_norm.weight")
    assert first.inputs == ("blocks.0.q", "blocks.0.k", "blocks.0.v")


def test_a_norm_over_all_heads_together_stays_out_of_attention():
    """As olmo2 has it; the keys' own norm by heads still joins."""
    graph = tiny_graph(blocks=1, head_norms=True)
    nodes = (replace(n, op=Norm(heads=1)) if n.name == "blocks.0.q_norm" else n for n in graph.nodes)
    fused = fuse(replace(graph, nodes=tuple(nodes)))
    (attention,) = (n for n in fused.nodes if isinstance(n.op, FusedAttention))
    assert (attention.op.q_norm, attention.op.k_norm) == (None, Norm(heads=2))
    assert attention.inputs == ("blocks.0.q_norm", "blocks.0.k", "blocks.0.v")
    assert "Norm blocks.0.q_norm stands alone: it norms 1 parts, not 4 heads" in fused.notes


@pytest.mark.parametrize("pre_norms", [True, False])
def test_norms_of_a_blocks_output_join_the_residual(pre_norms):
    fused = fuse(tiny_graph(blocks=1, pre_norms=pre_norms, post_norms=True))
    post = [n for n in fused.nodes if isinstance(n.op, FusedNorm)]
    assert [n.inputs for n in post] == [("blocks.0.o", "embed"), ("blocks.0.down", "blocks.0.attention_out")]
    assert "Norm" not in ops(fused)
    assert "Add" not in ops(fused)


def test_kept_values_stay_and_the_rest_still_fuses():
    keep = ["blocks.0.attention_norm", "blocks.0.q_rope", "blocks.1.gate", "blocks.1.o", "norm"]
    graph = tiny_graph()
    fused = fuse(graph, keep)
    made = {v for n in fused.nodes for v in n.outputs}
    assert made.issuperset(keep)
    assert any("blocks.0.attention_norm must stay readable" in note for note in fused.notes)
    group = next(n for n in fused.nodes if "blocks.0.q" in n.outputs)
    assert group.op == FusedLinear(None, (False,) * 3)
    gated = next(n for n in fused.nodes if "blocks.1.gate" in n.outputs)
    assert gated.op == FusedLinear(Norm(), (False, False))
    weights = random_arrays(graph)
    expected = reference.values(graph, weights, IDS, keep=keep)
    for name, value in reference.values(fused, weights, IDS, keep=keep).items():
        np.testing.assert_array_equal(value, expected[name])


def test_blocks_are_found_again():
    graph = tiny_graph(blocks=3, post_norms=True)
    fused = fuse(graph, keep=["blocks.1.attention_norm"])
    for before, after in zip(graph.blocks, fused.blocks, strict=True):
        assert (before.input, before.output) == (after.input, after.output)
        weights = {w for n in graph.nodes[before.start : before.stop] for w in n.weights}
        assert weights == {w for n in fused.nodes[after.start : after.stop] for w in n.weights}
    assert fuse(graph.block(1)).nodes[1:] == tuple(
        replace(n, op=replace(n.op, attention=replace(n.op.attention, layer=0)))
        if isinstance(n.op, FusedAttention)
        else n
        for n in fuse(graph).nodes[fuse(graph).blocks[1].start : fuse(graph).blocks[1].stop]
    )


def parallel_graph():
    """Attention's and the MLP's inputs from one norm, as cohere and phi have it."""
    g = GraphBuilder(context=8, vocabulary=5, hidden=4)

    def linear(name, x):
        return g.add(Linear(), name, x, weights=(g.weight(f"{name}.weight", 4, 4),))

    x = g.add(Embed(), "embed", TOKENS, weights=(g.weight("table", 5, 4),))
    h = g.add(Norm(), "norm", x, weights=(g.weight("norm.weight", 4),))
    q, k, v = (g.add(Rope(1, 4, (1.0,)), "q_rope", linear("q", h)), linear("k", h), linear("v", h))
    a = linear("o", g.add(Attention(1, 1, 4, 0.5, 0), "attention", q, k, v))
    m = linear("down", g.add(Gate("silu"), "gated", linear("gate", h), linear("up", h)))
    return g.finish(g.add(Add(), "out", g.add(Add(), "half", x, a), m))


def test_parallel_consumers_share_a_norm_that_stands_alone():
    fused = fuse(parallel_graph())
    assert ops(fused) == [
        "Embed",
        "Norm",
        "FusedLinear",
        "Rope",
        "Attention",
        "FusedLinear",
        "FusedLinear",
        "FusedLinear",
    ]
    assert "Norm norm stands alone: 2 nodes read norm" in fused.notes
    assert any(note.startswith("Attention attention stands alone") for note in fused.notes)


def test_notes_say_what_and_why():
    notes = fuse(tiny_graph(blocks=1)).notes
    assert "FusedLinear blocks.0.q: blocks.0.q, blocks.0.k, blocks.0.v read blocks.0.attention_norm" in notes
    assert "FusedLinear blocks.0.o: blocks.0.o adds to embed" in notes
