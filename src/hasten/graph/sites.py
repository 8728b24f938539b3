"""Where a block's heads and feed-forward channels stand: the nodes whose weights shrink together when some go."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import ConfigError
from hasten.graph.graph import Graph, Node
from hasten.graph.ops import Activation, Attention, Gate, Linear, Norm, Rope

Way = tuple[Node, ...]
"""A linear and the nodes that its output goes through alone."""


@dataclass(frozen=True)
class AttentionSite:
    """`ways`: of queries, keys and values into `attention`: the projection, then norms and rope. `output`: o_proj."""

    attention: Node
    ways: tuple[Way, Way, Way]
    output: Node

    @property
    def op(self) -> Attention:
        assert isinstance(self.attention.op, Attention)
        return self.attention.op


@dataclass(frozen=True)
class FeedForwardSite:
    """`inputs`: the projections (gate and up, or up alone) whose rows are the channels; `output`: down_proj."""

    inputs: tuple[Node, ...]
    middle: Node
    output: Node


def attention_site(graph: Graph, index: int) -> AttentionSite:
    """Of block `index`. Raises ConfigError where its heads cannot be told apart in the weights."""
    links = _Links(graph, index)
    found = [n for n in links.nodes if isinstance(n.op, Attention)]
    if len(found) != 1:
        raise ConfigError(f"block {index} has {len(found)} attentions; heads can be removed where there is one")
    (node,) = found
    op = node.op
    assert isinstance(op, Attention)
    heads = (op.heads, op.kv_heads, op.kv_heads)
    q, k, v = (links.way(value, count) for value, count in zip(node.inputs, heads, strict=True))
    return AttentionSite(node, (q, k, v), links.linear_after(node))


def feed_forward_site(graph: Graph, index: int) -> FeedForwardSite:
    """Of block `index`. Raises ConfigError where its channels cannot be told apart in the weights."""
    links = _Links(graph, index)
    found = [n for n in links.nodes if isinstance(n.op, Gate | Activation)]
    if len(found) != 1:
        raise ConfigError(f"block {index} has {len(found)} activations; channels can be removed where there is one")
    (node,) = found
    inputs = tuple(links.way(value, 0)[0] for value in node.inputs)
    return FeedForwardSite(inputs, node, links.linear_after(node))


class _Links:
    """Who makes and who reads what, seen from one block."""

    def __init__(self, graph: Graph, index: int) -> None:
        block = graph.blocks[index]
        self.index, self.uses = index, graph.uses()
        self.nodes = graph.nodes[block.start : block.stop]
        self._makers = {value: node for node in self.nodes for value in node.outputs}
        self._weight_uses: dict[str, int] = {}
        for weight in (w for node in graph.nodes for w in node.weights):
            self._weight_uses[weight] = self._weight_uses.get(weight, 0) + 1

    def way(self, value: str, heads: int) -> Way:
        """From the linear that makes `value` to the last node before it, each read by the next alone."""
        passed: list[Node] = []
        while True:
            node = self._makers.get(value)
            if node is None or self.uses[value] != 1:
                raise self._refusal(f"{value} is not made for it alone")
            passed.insert(0, node)
            if isinstance(node.op, Linear):
                return self._own(tuple(passed))
            if isinstance(node.op, Norm) and node.op.heads != heads:
                raise self._refusal(f"{node.name} norms all heads together, so that removing one changes the others")
            if not isinstance(node.op, Norm | Rope):
                raise self._refusal(f"{type(node.op).__name__} {node.name} stands in the way")
            value = node.inputs[0]

    def linear_after(self, node: Node) -> Node:
        """The linear that alone reads what `node` makes."""
        (value,) = node.outputs
        readers = [n for n in self.nodes if value in n.inputs]
        if len(readers) != 1 or self.uses[value] != 1 or not isinstance(readers[0].op, Linear):
            raise self._refusal(f"{value} is not read by one linear alone")
        return self._own((readers[0],))[0]

    def _own(self, way: Way) -> Way:
        for weight in way[0].weights:
            if self._weight_uses[weight] != 1:
                raise self._refusal(f"tensor '{weight}' is used in more places than one")
        return way

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(f"block {self.index} cannot be made narrower: {why}")
