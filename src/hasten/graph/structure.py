"""How a model departs from what its config.json builds: blocks dropped, blocks narrowed, matrices factored.

The result is an ordinary graph: whatever fuses, plans, runs, calibrates or measures graphs needs to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.errors import ConfigError
from hasten.graph.graph import Block, Graph, Node, WeightSpec, with_own_slots
from hasten.graph.ops import Add, Linear, Norm, Op, Rope
from hasten.graph.sites import attention_site, feed_forward_site

LEFT, RIGHT = ".left", ".right"
"""What the factors of a matrix are called after its own name."""


@dataclass(frozen=True)
class LowRank:
    """W [out, in] becomes left [out, rank] times right [rank, in]; with `residual` W stays: W x + left (right x)."""

    rank: int
    residual: bool = False


@dataclass(frozen=True)
class Narrow:
    """How much of a block is left; None: all of it. Query heads share key heads in groups of heads / kv_heads."""

    heads: int | None = None
    kv_heads: int | None = None
    feed_forward: int | None = None


@dataclass(frozen=True)
class Structure:
    """`dropped`: blocks left out; `narrowed`: blocks by number; `low_rank`: matrices by name.

    Blocks are numbered, and tensors named, as in the graph that it is applied to.
    """

    dropped: tuple[int, ...] = ()
    narrowed: Mapping[int, Narrow] = field(default_factory=dict)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.dropped or self.narrowed or self.low_rank)

    def kept(self, blocks: int) -> list[int]:
        """The numbers of the blocks that stay, of `blocks`."""
        return [i for i in range(blocks) if i not in self.dropped]

    def json(self) -> dict[str, Any]:
        """As hasten.json holds it."""
        narrowed = {str(i): _fields(n) for i, n in sorted(self.narrowed.items())}
        low_rank = {name: _fields(entry) for name, entry in self.low_rank.items()}
        return {"dropped": list(self.dropped), "narrowed": narrowed, "low_rank": low_rank}

    def then(self, later: Structure, graph: Graph) -> Structure:
        """This and then `later`, which numbers blocks as this one leaves them, as one structure of `graph`."""
        numbers = self.kept(len(graph.blocks))
        _check_blocks(later, len(numbers))
        dropped = tuple(sorted({*self.dropped, *(numbers[i] for i in later.dropped)}))
        narrowed = dict(self.narrowed)
        for index, narrow in later.narrowed.items():
            number = numbers[index]
            given = {name: value for name, value in _fields(narrow).items() if value is not None}
            narrowed[number] = replace(narrowed.get(number, Narrow()), **given)
        left = restructured(graph, Structure(dropped)).weights
        return Structure(
            dropped,
            {i: n for i, n in narrowed.items() if i not in dropped},
            {name: entry for name, entry in {**self.low_rank, **later.low_rank}.items() if name in left},
        )


def parse(value: object) -> Structure:
    """What `Structure.json` gave, back. Raises ConfigError naming what is wrong: the value comes from a file."""
    facts = _object(value, "structure", ("dropped", "narrowed", "low_rank"))
    dropped = facts.get("dropped", [])
    if not isinstance(dropped, list) or not all(type(i) is int for i in dropped):
        raise ConfigError("structure: dropped must be a list of block numbers")
    if sorted(set(dropped)) != dropped:
        raise ConfigError("structure: dropped must name every block once, in order")
    narrowed = {}
    for key, entry in _object(facts.get("narrowed", {}), "structure: narrowed").items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
            raise ConfigError(f"structure: narrowed has the key '{key[:200]}', must be a block's number")
        narrowed[int(key)] = _narrow(entry, f"structure: block {key}")
    low_rank = {}
    for name, entry in _object(facts.get("low_rank", {}), "structure: low_rank").items():
        where = f"structure: low rank of '{name[:200]}'"
        found = _object(entry, where, ("rank", "residual"))
        if type(found.get("rank")) is not int or type(found.get("residual", False)) is not bool:
            raise ConfigError(f"{where} must have a whole number as rank, and true or false as residual")
        low_rank[name] = LowRank(found["rank"], found.get("residual", False))
    return Structure(tuple(dropped), narrowed, low_rank)


def _narrow(entry: object, where: str) -> Narrow:
    found = _object(entry, where, ("heads", "kv_heads", "feed_forward"))
    for name, value in found.items():
        if value is not None and type(value) is not int:
            raise ConfigError(f"{where}: {name} must be a whole number or null")
    return Narrow(**found)


def _object(value: object, where: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} must be an object")
    odd = [key for key in value if known is not None and key not in known]
    if odd:
        raise ConfigError(f"{where} has the unknown field '{odd[0][:200]}'")
    return value


def _fields(entry: Narrow | LowRank) -> dict[str, Any]:
    return dict(vars(entry))


def restructured(graph: Graph, structure: Structure) -> Graph:
    """`graph` with blocks dropped, narrowed and matrices factored; the cache's slots are counted anew.

    Names stay: what is left of block 4 is still called so after block 3 was dropped. A factored `X.weight` becomes
    `X.weight.left` and `X.weight.right`. Raises ConfigError naming what the graph does not have or cannot do.
    """
    if not structure:
        return graph
    _check_blocks(structure, len(graph.blocks))
    for index, narrow in structure.narrowed.items():
        graph = _narrowed(graph, index, narrow)
    graph = _dropped(graph, structure.dropped)
    for name, low_rank in structure.low_rank.items():
        graph = _factored(graph, name, low_rank)
    graph.widths()
    return graph


def _check_blocks(structure: Structure, blocks: int) -> None:
    for index in (*structure.dropped, *structure.narrowed):
        if not 0 <= index < blocks:
            raise ConfigError(f"structure: there is no block {index}, the model has {blocks}, numbered from 0")
    if structure.dropped and len(set(structure.dropped)) == blocks:
        raise ConfigError(f"structure: all {blocks} blocks are dropped", "keep one at least")
    both = sorted(set(structure.dropped) & set(structure.narrowed))
    if both:
        raise ConfigError(f"structure: block {both[0]} is both dropped and narrowed")


def _narrowed(graph: Graph, index: int, narrow: Narrow) -> Graph:
    ops: dict[str, Op] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if narrow.heads is not None or narrow.kv_heads is not None:
        _narrow_heads(graph, index, narrow, ops, shapes)
    if narrow.feed_forward is not None:
        feed_forward = feed_forward_site(graph, index)
        width = graph.weights[feed_forward.output.weights[0]].shape[1]
        _in_range(index, "feed-forward channels", narrow.feed_forward, width)
        for node in feed_forward.inputs:
            shapes |= {w: (narrow.feed_forward, *graph.weights[w].shape[1:]) for w in node.weights}
        output = feed_forward.output.weights[0]
        shapes[output] = (graph.weights[output].shape[0], narrow.feed_forward)
    return _rewritten(graph, lambda n: [replace(n, op=ops[n.name])] if n.name in ops else [n], shapes)


def _narrow_heads(
    graph: Graph, index: int, narrow: Narrow, ops: dict[str, Op], shapes: dict[str, tuple[int, ...]]
) -> None:
    site = attention_site(graph, index)
    heads = site.op.heads if narrow.heads is None else narrow.heads
    kv_heads = site.op.kv_heads if narrow.kv_heads is None else narrow.kv_heads
    _in_range(index, "heads", heads, site.op.heads)
    _in_range(index, "key and value heads", kv_heads, site.op.kv_heads)
    if heads % kv_heads:
        raise ConfigError(f"structure: block {index} cannot share {kv_heads} key heads among {heads} query heads")
    ops[site.attention.name] = replace(site.op, heads=heads, kv_heads=kv_heads)
    for way, count in zip(site.ways, (heads, kv_heads, kv_heads), strict=True):
        shapes |= {w: (count * site.op.head_dim, *graph.weights[w].shape[1:]) for w in way[0].weights}
        ops |= {node.name: replace(node.op, heads=count) for node in way[1:] if isinstance(node.op, Norm | Rope)}
    output = site.output.weights[0]
    shapes[output] = (graph.weights[output].shape[0], heads * site.op.head_dim)


def _in_range(index: int, what: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise ConfigError(f"structure: block {index} keeps {count} {what}, must be 1 to {most}")


def _dropped(graph: Graph, dropped: tuple[int, ...]) -> Graph:
    """Without these blocks: whoever read a block's output reads its input."""
    instead: dict[str, str] = {}
    gone: set[int] = set()
    for index in sorted(dropped):
        block = graph.blocks[index]
        instead[block.output] = instead.get(block.input, block.input)
        gone.update(range(block.start, block.stop))
    kept: list[Node] = []
    for place, node in enumerate(graph.nodes):
        if place not in gone:
            kept.append(replace(node, inputs=tuple(instead.get(v, v) for v in node.inputs)))
    blocks = []
    for index, block in enumerate(graph.blocks):
        if index not in dropped:
            before = sum(place < block.start for place in gone)
            entry = instead.get(block.input, block.input)
            blocks.append(replace(block, start=block.start - before, stop=block.stop - before, input=entry))
    inside = {v for place in gone for v in graph.nodes[place].outputs}
    for node in kept:
        if inside.intersection(node.inputs):
            raise ConfigError(f"structure: a block cannot be dropped, {node.name} reads from inside it")
    used = {w for n in kept for w in n.weights}
    return replace(
        graph,
        nodes=tuple(with_own_slots(kept)[0]),
        weights={name: spec for name, spec in graph.weights.items() if name in used},
        blocks=tuple(blocks),
        output=instead.get(graph.output, graph.output),
    )


def _factored(graph: Graph, name: str, low_rank: LowRank) -> Graph:
    spec = graph.weights.get(name)
    readers = [node for node in graph.nodes if name in node.weights]
    if spec is None or not readers:
        raise ConfigError(f"structure: low rank of '{name[:200]}', which this model does not have")
    if not spec.is_matrix or len(readers) != 1 or not isinstance(readers[0].op, Linear):
        raise ConfigError(
            f"structure: '{name[:200]}' cannot be of low rank: it is not a matrix that one linear alone multiplies by"
        )
    out, width = spec.shape
    if not 1 <= low_rank.rank <= min(out, width):
        raise ConfigError(
            f"structure: '{name}' [{out}, {width}] cannot have rank {low_rank.rank}, must be 1 to {min(out, width)}"
        )
    node = readers[0]
    stages = _beside(node, name) if low_rank.residual else _instead(node, name)
    shapes = {name + LEFT: (out, low_rank.rank), name + RIGHT: (low_rank.rank, width)}
    return _rewritten(graph, lambda n: stages if n is node else [n], shapes)


def _instead(node: Node, name: str) -> list[Node]:
    inner = f"{node.name}{RIGHT}"
    return [
        Node(Linear(), inner, node.inputs, (inner,), (name + RIGHT,)),
        replace(node, inputs=(inner,), weights=(name + LEFT, *node.weights[1:])),
    ]


def _beside(node: Node, name: str) -> list[Node]:
    """The sum comes last, so that it fuses with `left`; base and `right` read the same input together."""
    base, left, right = f"{node.name}.base", f"{node.name}{LEFT}", f"{node.name}{RIGHT}"
    return [
        replace(node, name=base, outputs=(base,)),
        Node(Linear(), right, node.inputs, (right,), (name + RIGHT,)),
        Node(Linear(), left, (right,), (left,), (name + LEFT,)),
        Node(Add(), node.name, (base, left), node.outputs),
    ]


def _rewritten(graph: Graph, rewrite: Callable[[Node], list[Node]], shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """Every node replaced by `rewrite(node)`; weights in `shapes` have a new shape or are new, unused ones go.

    A weight of a new shape is no longer what the checkpoint keeps under `source`: it has its own name for source.
    """
    nodes: list[Node] = []
    starts = []
    for node in graph.nodes:
        starts.append(len(nodes))
        nodes += rewrite(node)
    starts.append(len(nodes))
    specs = {**graph.weights, **{w: WeightSpec(w, shape, w) for w, shape in shapes.items()}}
    used = dict.fromkeys(w for n in nodes for w in n.weights)
    order = [w for w in graph.weights if w in used] + [w for w in used if w not in graph.weights]
    blocks = [Block(starts[b.start], starts[b.stop], b.input, b.output) for b in graph.blocks]
    return replace(graph, nodes=tuple(nodes), weights={w: specs[w] for w in order}, blocks=tuple(blocks))
