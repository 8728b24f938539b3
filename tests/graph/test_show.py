"""What `hasten inspect --graph` prints."""

from support import tiny_graph

from hasten.graph.fuse import fuse
from hasten.graph.show import describe


def test_a_line_a_node_with_inputs_weights_and_widths():
    lines = describe(tiny_graph()).splitlines()
    assert lines[0] == "Embed embed: tokens -> embed [24]; weights embed.weight [50, 24]"
    assert (
        "Linear blocks.0.down: blocks.0.gated [40] -> blocks.0.down [24]; weights blocks.0.down.weight [24, 40]"
        in lines
    )
    assert (
        "Rope(heads=4, head_dim=8, frequencies=<4>) blocks.0.q_rope: blocks.0.q [32] -> blocks.0.q_rope [32]" in lines
    )


def test_blocks_alike_are_shown_once_unless_all_are_wanted():
    graph = tiny_graph(blocks=12)
    assert "-- blocks 0 to 11, alike" in describe(graph)
    assert "blocks.7.q" not in describe(graph)
    assert "blocks.7.q" in describe(graph, whole=True)
    assert describe(graph, whole=True).count("\n") > 12 * len(graph.nodes) // 13


def test_blocks_that_differ_are_shown_apart():
    fused = fuse(tiny_graph(blocks=4), keep=["blocks.2.attention_norm"])
    shown = describe(fused)
    for title in ("blocks 0 to 1, alike", "block 2", "block 3"):
        assert f"-- {title}\n" in shown


def test_notes_follow_with_their_counts():
    shown = describe(fuse(tiny_graph(blocks=4)))
    assert "FusedLinear blocks.N.q: blocks.N.attention_norm goes with the quantisation of its input (4 times)" in shown
