"""Restructured graphs compute what the graph they come from computes with other weights."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from structures import is_output, random_kept, structures
from support import random_arrays, tiny_graph

from hasten import models
from hasten.backends import reference
from hasten.errors import ConfigError
from hasten.graph.fuse import fuse
from hasten.graph.graph import Graph
from hasten.graph.ops import Attention, FusedAttention, FusedLinear, Norm
from hasten.graph.structure import LEFT, RIGHT, LowRank, Narrow, Structure, parse, restructured

IDS = np.array([4, 1, 3, 2, 0, 3, 7])
SIZES = {"blocks": 3, "heads": 4, "kv_heads": 2, "feed_forward": 40}
VARIANTS = {
    "llama": {},
    "qwen2": {"bias": True},
    "qwen3": {"head_norms": True},
    "gemma2": {"post_norms": True, "tied": False},
    "olmo2": {"pre_norms": False, "post_norms": True},
}
NAMES = [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("q", "k", "v", "o", "gate", "up", "down")]
STRUCTURES = structures(**SIZES, names=NAMES)


def zeroed(graph: Graph, arrays: dict[str, Any], structure: Structure, seed: int) -> tuple[dict[str, Any], Any]:
    """(weights of the restructured graph, logits it must give): removed heads, channels and blocks add nothing.

    The oracle is the graph as it was, with columns of o and down at zero, and products in place of factors.
    """
    rng = np.random.default_rng(seed)
    made, whole = dict(arrays), dict(arrays)
    for name, index in random_kept(structure, graph, rng).items():
        if name not in arrays:
            continue
        if is_output(name):
            made[name] = arrays[name][:, index]
            whole[name] = np.zeros_like(arrays[name])
            whole[name][:, index] = made[name]
        else:
            made[name] = arrays[name][index]
    for block in structure.dropped:
        for part in ("o", "down"):
            whole[f"blocks.{block}.{part}.weight"] = np.zeros_like(arrays[f"blocks.{block}.{part}.weight"])
    return made, reference.forward(graph, whole, IDS)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@given(structure=structures(**SIZES, names=[]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_removed_adds_nothing(options: dict[str, Any], structure: Structure, seed: int) -> None:
    narrowed = {
        i: Narrow(n.heads, n.kv_heads, n.feed_forward) for i, n in structure.narrowed.items() if n.kv_heads != 1
    }
    structure = Structure(structure.dropped, narrowed)
    graph = tiny_graph(blocks=3, **options)
    made, expected = zeroed(graph, random_arrays(graph), structure, seed)
    found = reference.forward(restructured(graph, structure), made, IDS)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(structures(**SIZES, names=NAMES), st.booleans())
@settings(max_examples=60, deadline=None)
def test_factors_stand_for_their_product(structure: Structure, bias: bool) -> None:
    graph = tiny_graph(blocks=3, bias=bias)
    small = restructured(graph, Structure(structure.dropped, structure.narrowed))
    made = restructured(graph, structure)
    arrays = random_arrays(made)
    product = {name: arrays.get(name) for name in small.weights}
    for name, low_rank in structure.low_rank.items():
        product[name] = arrays[name + LEFT] @ arrays[name + RIGHT] + (arrays[name] if low_rank.residual else 0)
    expected = reference.forward(small, product, IDS)
    np.testing.assert_allclose(reference.forward(made, arrays, IDS), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(reference.forward(fuse(made), arrays, IDS), reference.forward(made, arrays, IDS))
    slots = [n.op.layer for n in made.nodes if isinstance(n.op, Attention)]
    assert slots == list(range(3 - len(structure.dropped)))
    assert [made.nodes[b.stop - 1].outputs[0] for b in made.blocks] == [b.output for b in made.blocks]


@given(STRUCTURES, st.data())
@settings(max_examples=60, deadline=None)
def test_two_steps_are_one(first: Structure, data: st.DataObject) -> None:
    graph = tiny_graph(blocks=3)
    first = Structure(first.dropped, first.narrowed)  # what is factored already is not narrowed
    left = restructured(graph, first)
    second = data.draw(structures(len(left.blocks), 2, 1, 1, []))
    narrowed = {i: Narrow(1, 1, n.feed_forward) for i, n in second.narrowed.items()}
    names = [w for w in restructured(left, Structure(second.dropped)).weights if w in NAMES]
    low_rank = {n: LowRank(1) for n in data.draw(st.sets(st.sampled_from(names), max_size=4))}
    second = Structure(second.dropped, narrowed, low_rank)
    both = restructured(left, second)
    assert restructured(graph, first.then(second, graph)) == both


@given(STRUCTURES)
def test_json_round_trip(structure: Structure) -> None:
    assert parse(json.loads(json.dumps(structure.json()))) == structure
    assert bool(structure) == (structure != Structure())


def test_fusion_around_factors() -> None:
    """Right factors are quantised with what else reads their input, left ones add to the residual."""
    at = "blocks.0"
    beside = {f"{at}.{part}.weight": LowRank(3, True) for part in ("q", "o")}
    structure = Structure((), {}, {**beside, f"{at}.v.weight": LowRank(2), f"{at}.down.weight": LowRank(5)})
    fused = fuse(restructured(tiny_graph(), structure))
    nodes = fused.nodes[fused.blocks[0].start : fused.blocks[0].stop]
    group = next(n for n in nodes if n.outputs[0] == f"{at}.q.base")
    assert group.op == FusedLinear(Norm(), (False,) * 4)
    assert group.outputs == (f"{at}.q.base", f"{at}.q.right", f"{at}.k", f"{at}.v.right")
    for part, residual in (("q", f"{at}.q.base"), ("o", f"{at}.o.base")):
        left = next(n for n in nodes if n.weights == (f"{at}.{part}.weight.left",))
        assert left.op == FusedLinear(None, (False,), residual=True)
        assert left.inputs == (f"{at}.{part}.right", residual)
    last = nodes[-1]
    assert (last.op, last.weights) == (FusedLinear(None, (False,), residual=True), (f"{at}.down.weight.left",))
    assert any(isinstance(n.op, FusedAttention) for n in nodes)


@pytest.mark.parametrize("name", [n for n in tiny.CONFIGS if n != "gemma3"])
def test_every_architecture(name: str) -> None:
    """Blocks dropped and factored in any; heads stay together where one norm spans them."""
    graph = models.build(tiny.CONFIGS[name], tiny.context(name))
    down = "model.layers.0.mlp.down_proj.weight"
    structure = Structure((1,), {0: Narrow(feed_forward=20)}, {down: LowRank(4)})
    made = restructured(graph, structure)
    assert len(made.blocks) == len(graph.blocks) - 1
    assert made.weights[down + RIGHT].shape == (4, 20)
    whole = any(
        isinstance(n.op, Norm) and n.name.endswith(("q_norm", "k_norm")) and n.op.heads == 1 for n in graph.nodes
    )
    heads = Structure(narrowed={0: Narrow(heads=1, kv_heads=1)})
    if whole and name.startswith("olmo2"):
        with pytest.raises(ConfigError, match="norms all heads together"):
            restructured(graph, heads)
        return
    assert next(n.op for n in restructured(graph, heads).nodes if isinstance(n.op, Attention)).heads == 1


HOSTILE: list[tuple[Any, str]] = [
    ([], "structure must be an object"),
    ({"blocks": {}}, "unknown field 'blocks'"),
    ({"dropped": 3}, "dropped must be a list"),
    ({"dropped": [True]}, "dropped must be a list"),
    ({"dropped": [1, 1]}, "every block once"),
    ({"dropped": [-1]}, "there is no block -1"),
    ({"dropped": [2]}, "there is no block 2, the model has 2"),
    ({"dropped": [0, 1]}, "all 2 blocks are dropped"),
    ({"narrowed": {"7": {}}}, "there is no block 7"),
    ({"narrowed": {"01": {}}}, "key '01'"),
    ({"narrowed": {"-1": {}}}, "key '-1'"),
    ({"narrowed": {"9" * 5000: {}}}, "key '9999"),
    ({"narrowed": {"0": 3}}, "block 0 must be an object"),
    ({"narrowed": {"0": {"heads": "2"}}}, "heads must be a whole number"),
    ({"narrowed": {"0": {"heads": True}}}, "heads must be a whole number"),
    ({"narrowed": {"0": {"layers": 1}}}, "unknown field 'layers'"),
    ({"narrowed": {"0": {"heads": 3}}}, "cannot share 2 key heads among 3 query heads"),
    ({"narrowed": {"0": {"heads": 0}}}, "keeps 0 heads, must be 1 to 4"),
    ({"narrowed": {"0": {"kv_heads": 3}}}, "keeps 3 key and value heads, must be 1 to 2"),
    ({"narrowed": {"0": {"feed_forward": -8}}}, "keeps -8 feed-forward channels"),
    ({"narrowed": {"0": {"feed_forward": 1 << 70}}}, "feed-forward channels, must be 1 to 40"),
    ({"dropped": [0], "narrowed": {"0": {"feed_forward": 8}}}, "block 0 is both dropped and narrowed"),
    ({"low_rank": {"blocks.0.q.weight": 3}}, "must be an object"),
    ({"low_rank": {"blocks.0.q.weight": {}}}, "whole number as rank"),
    ({"low_rank": {"blocks.0.q.weight": {"rank": 2, "residual": 1}}}, "true or false as residual"),
    ({"low_rank": {"blocks.0.q.weight": {"rank": -1}}}, r"cannot have rank -1, must be 1 to 24"),
    ({"low_rank": {"blocks.0.q.weight": {"rank": 25}}}, r"cannot have rank 25"),
    ({"low_rank": {"blocks.9.q.weight": {"rank": 2}}}, "this model does not have"),
    ({"dropped": [0], "low_rank": {"blocks.0.q.weight": {"rank": 2}}}, "this model does not have"),
    ({"low_rank": {"blocks.0.q.weight.left": {"rank": 1}}}, "this model does not have"),
    ({"low_rank": {"norm.weight": {"rank": 2}}}, "is not a matrix that one linear alone multiplies by"),
    ({"low_rank": {"embed.weight": {"rank": 2}}}, "is not a matrix that one linear alone multiplies by"),
    ({"narrowed": {"0": {"feed_forward": 4}}, "low_rank": {"blocks.0.up.weight": {"rank": 5}}}, "must be 1 to 4"),
]


@pytest.mark.parametrize(("value", "message"), HOSTILE, ids=[m[:40] for _, m in HOSTILE])
def test_what_a_graph_cannot_be_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        restructured(tiny_graph(), parse(json.loads(json.dumps(value))))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(
    st.sampled_from(["dropped", "narrowed", "low_rank", "0", "1", "blocks.0.q.weight", "rank", "heads", "residual"]), s
)))  # fmt: skip
def test_any_document_is_read_or_refused(value: Any) -> None:
    try:
        made = restructured(tiny_graph(), parse(value))
    except ConfigError:
        return
    made.widths()
