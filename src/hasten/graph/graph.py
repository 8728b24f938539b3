"""A model as a graph: nodes in execution order over named values, each a float32 array [tokens, width]."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hasten.errors import ConfigError
from hasten.graph.ops import Attention, FusedAttention, Input, Op, SelectRows

TOKENS = "tokens"
"""The one value that is not float32: token ids [tokens]."""


@dataclass(frozen=True)
class WeightSpec:
    """A tensor the graph needs: `shape` ([out, in] or [n]), and where a checkpoint keeps it.

    `source` is the checkpoint's tensor name; `rows` cuts a part out of a fused tensor (phi3's qkv_proj).
    """

    name: str
    shape: tuple[int, ...]
    source: str
    rows: tuple[int, int] | None = None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class Node:
    """One op applied. `inputs` and `outputs` name values, `weights` names WeightSpecs, in the order the op states."""

    op: Op
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A transformer block: nodes[start:stop], reading `input` and leaving `output`."""

    start: int
    stop: int
    input: str
    output: str


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order; `output` is the value handed out ([rows, vocabulary] logits for a whole model)."""

    nodes: tuple[Node, ...]
    weights: dict[str, WeightSpec]
    output: str
    blocks: tuple[Block, ...] = ()
    context: int = 2048
    vocabulary: int = 0
    hidden: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)
    slots: tuple[int, ...] | None = None
    """Of a graph that was cut from another: the slot that each of its cache slots has in the whole model."""

    def matrices(self) -> list[WeightSpec]:
        """Weights with two dimensions, in order of first use: what compression may touch."""
        used = dict.fromkeys(w for n in self.nodes for w in n.weights)
        return [self.weights[w] for w in used if self.weights[w].is_matrix]

    def parameters(self) -> int:
        total = 0
        for spec in self.weights.values():
            count = 1
            for n in spec.shape:
                count *= n
            total += count
        return total

    def widths(self) -> dict[str, int]:
        """Width of every value. Raises ConfigError naming the node whose inputs, weights and attributes disagree."""
        widths = {TOKENS: 1}
        for node in self.nodes:
            shapes = tuple(self.weights[w].shape for w in node.weights)
            try:
                outputs = node.op.widths(tuple(widths[v] for v in node.inputs), shapes)
            except ConfigError as error:
                raise ConfigError(f"{node.name}: {error.message}", error.hint) from None
            widths.update(zip(node.outputs, outputs, strict=True))
        del widths[TOKENS]
        return widths

    def row_values(self) -> frozenset[str]:
        """Values that hold only the wanted rows: what SelectRows makes and all that follows from it."""
        rows: set[str] = set()
        for node in self.nodes:
            if isinstance(node.op, SelectRows) or rows.intersection(node.inputs):
                rows.update(node.outputs)
        return frozenset(rows)

    def uses(self) -> dict[str, int]:
        """How often each value is read; being the graph's output counts as once."""
        counts = {v: 0 for n in self.nodes for v in n.outputs}
        for value in [v for n in self.nodes for v in n.inputs if v != TOKENS] + [self.output]:
            counts[value] += 1
        return counts

    def block(self, index: int) -> Graph:
        """Block `index` alone, from an Input of hidden states to the block's output; all names as in this graph."""
        block = self.blocks[index]
        return self._cut((block,), block.start, block.stop, block.input, block.output)

    def tail(self, index: int) -> Graph:
        """Block `index` and all that follows, behind an Input of hidden states; len(blocks): what follows the last."""
        if index == len(self.blocks):
            start, entry = self.blocks[-1].stop, self.blocks[-1].output
        else:
            start, entry = self.blocks[index].start, self.blocks[index].input
        return self._cut(self.blocks[index:], start, len(self.nodes), entry, self.output)

    def _cut(self, blocks: tuple[Block, ...], start: int, stop: int, entry: str, output: str) -> Graph:
        """nodes[start:stop] behind an Input called `entry`. Cache slots are counted anew from 0."""
        rest, slots = with_own_slots(self.nodes[start:stop])
        nodes = [Node(Input(self.widths()[entry]), entry, (), (entry,)), *rest]
        used = dict.fromkeys(w for n in nodes for w in n.weights)
        return replace(
            self,
            nodes=tuple(nodes),
            weights={w: self.weights[w] for w in used},
            output=output,
            slots=slots if self.slots is None else tuple(self.slots[s] for s in slots),
            blocks=tuple(replace(b, start=b.start - start + 1, stop=b.stop - start + 1) for b in blocks),
        )


def with_own_slots(nodes: Iterable[Node]) -> tuple[list[Node], tuple[int, ...]]:
    """The nodes with the cache's slots counted anew from 0, in the order in which attentions use them.

    And the slots that these had before.
    """
    slots: dict[int, int] = {}
    counted = []
    for node in nodes:
        op = node.op
        if isinstance(op, Attention):
            op = replace(op, layer=slots.setdefault(op.layer, len(slots)))
        elif isinstance(op, FusedAttention):
            slot = slots.setdefault(op.attention.layer, len(slots))
            op = replace(op, attention=replace(op.attention, layer=slot))
        counted.append(replace(node, op=op))
    return counted, tuple(slots)


class GraphBuilder:
    """Writes a graph op by op; every method returns the name of the value it makes.

    `weight()` declares a tensor and returns its name; naming the same tensor twice (a tied head) shares it.
    """

    def __init__(self, *, context: int, vocabulary: int, hidden: int) -> None:
        self._nodes: list[Node] = []
        self._weights: dict[str, WeightSpec] = {}
        self._blocks: list[Block] = []
        self._context, self._vocabulary, self._hidden = context, vocabulary, hidden

    def weight(self, name: str, *shape: int, source: str | None = None, rows: tuple[int, int] | None = None) -> str:
        spec = WeightSpec(name, shape, source or name, rows)
        known = self._weights.setdefault(name, spec)
        assert known == spec, f"{name} declared twice, differently"
        return name

    def add(self, op: Op, name: str, *inputs: str, weights: tuple[str, ...] = ()) -> str:
        """Append a node with one output, called `name`."""
        assert all(name not in n.outputs for n in self._nodes), name
        self._nodes.append(Node(op, name, inputs, (name,), weights))
        return name

    def begin_block(self) -> int:
        return len(self._nodes)

    def end_block(self, start: int, input: str, output: str) -> None:
        self._blocks.append(Block(start, len(self._nodes), input, output))

    def finish(self, output: str) -> Graph:
        return Graph(
            tuple(self._nodes),
            self._weights,
            output,
            tuple(self._blocks),
            context=self._context,
            vocabulary=self._vocabulary,
            hidden=self._hidden,
        )
