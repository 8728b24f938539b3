"""The buffer plan, proven by acting it out: every value is still there when it is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import graphs
from support import tiny_graph

from hasten.graph.fuse import fuse
from hasten.graph.graph import TOKENS
from hasten.graph.memory import plan


def act_out(graph, buffers, keep=()):
    """Runs the nodes over an arena that remembers who wrote each float last."""
    arena = np.full(buffers.total, -1)
    number = {value: i for i, value in enumerate(buffers.buffers)}

    def place(value):
        buffer = buffers.buffers[value]
        assert buffer.offset >= 0
        assert buffer.end <= buffers.total
        return arena[buffer.offset : buffer.end]

    for node in graph.nodes:
        for value in node.outputs:
            place(value)[:] = number[value]
        for value in (*node.outputs, *node.inputs):
            assert value == TOKENS or (place(value) == number[value]).all(), (
                f"{value} is gone when {node.name} needs it"
            )
    for value in {graph.output, *keep}:
        assert (place(value) == number[value]).all(), f"{value} is gone at the end"


@given(graphs(), st.data(), st.booleans(), st.integers(1, 5), st.integers(1, 3))
def test_no_value_is_overwritten_while_it_is_needed(graph, data, fused, max_tokens, max_rows):
    keep = data.draw(st.sets(st.sampled_from(list(graph.widths())), max_size=3))
    if fused:
        graph = fuse(graph, keep)
    buffers = plan(graph, max_tokens, max_rows, keep)
    act_out(graph, buffers, keep)
    assert set(buffers.offsets) == set(graph.widths())
    assert buffers.total <= sum(b.size for b in buffers.buffers.values())


def test_the_proof_sees_an_overlap():
    graph = tiny_graph()
    buffers = plan(graph, 4, 2)
    moved = buffers.buffers["blocks.0.attention_norm"]
    broken = {**buffers.buffers, "blocks.0.q": type(moved)(moved.offset, 4, 32, 0, 0)}
    with pytest.raises(AssertionError, match=r"gone when blocks\.0\.q"):
        act_out(graph, type(buffers)(broken, buffers.total))


def test_a_llama_reuses_memory_whatever_its_depth():
    small, deep = (fuse(tiny_graph(blocks=n)) for n in (2, 12))
    plans = [plan(g, 64, 4) for g in (small, deep)]
    assert plans[0].total == plans[1].total
    assert plans[1].total < 0.2 * sum(b.size for b in plans[1].buffers.values())
    # No plan can do with less than what is alive at once: made by now, and read now or later.
    floor = max(
        sum(
            plans[1].buffers[v].size
            for v in {v for n in deep.nodes[: i + 1] for v in n.outputs}
            & {*(v for n in deep.nodes[i:] for v in n.inputs), *deep.nodes[i].outputs}
        )
        for i in range(len(deep.nodes))
    )
    assert floor <= plans[1].total <= 1.25 * floor


def test_rows_and_strides():
    graph = tiny_graph(hidden=24, vocabulary=50)
    buffers = plan(graph, 128, 4).buffers
    assert (buffers["embed"].rows, buffers["embed"].stride) == (128, 32)
    assert (buffers["logits"].rows, buffers["logits"].stride) == (4, 64)
    assert (buffers["rows"].rows, buffers["norm"].rows) == (4, 4)
    assert all(b.offset % 16 == 0 for b in buffers.values())
    assert plan(tiny_graph(hidden=24, vocabulary=1024), 128, 4).buffers["logits"].stride == 1024 + 16  # not 4 KiB
