"""Bad batches, limits and weights: each gives one typed error and leaves the program as it was."""

from dataclasses import replace

import numpy as np
import pytest
from programs import TOKENS_OF, batch, limits, pack, sampling
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import native
from hasten.errors import BackendError, ContextError, InputError
from hasten.graph.graph import Node
from hasten.graph.ops import Op


@pytest.fixture(scope="module")
def small():
    graph = tiny_graph(vocabulary=50)
    return graph, pack(graph, random_arrays(graph), "int8-g32")


def changed(**changes):
    made = batch(TOKENS_OF[:4], table=(0, 1))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def ints(*values):
    return np.array(values, np.int32)


BAD = {
    "id too large": ({"tokens": ints(1, 2, 50, 3)}, "token 50 at row 2 is not in the vocabulary of 50"),
    "id negative": ({"tokens": ints(-1, 2, 4, 3)}, "token -1 at row 0"),
    "no tokens": (
        {"tokens": ints(), "positions": ints(), "starts": ints(0, 0), "rows": ints()},
        "a step of 0 tokens; it takes 1 to 48",
    ),
    "too many tokens": (
        {"tokens": ints(*[1] * 49), "positions": ints(*range(49)), "starts": ints(0, 49)},
        "a step of 49 tokens; it takes 1 to 48",
    ),
    "too many sequences": (
        {"starts": ints(0, 1, 2, 3, 4, 4), "block_tables": np.zeros((5, 2), np.int32)},
        "a step of 5 sequences; it takes 1 to 4",
    ),
    "no sequences": ({"starts": ints(), "block_tables": np.zeros((0, 2), np.int32)}, "starts has 0 entries"),
    "one start": ({"starts": ints(0), "block_tables": np.zeros((0, 2), np.int32)}, "a step of 0 sequences"),
    "starts late": ({"starts": ints(1, 4)}, "starts run from 1 to 4, must run from 0 to the 4 tokens"),
    "starts short": ({"starts": ints(0, 3)}, "starts run from 0 to 3"),
    "starts long": ({"starts": ints(0, 400000)}, "starts run from 0 to 400000"),
    "starts back": (
        {"starts": ints(0, 9, 4), "block_tables": np.array([[0, 1], [2, 3]], np.int32)},
        "sequence 0 owns rows 0 to 9",
    ),
    "empty sequence": (
        {"starts": ints(0, 4, 4), "block_tables": np.array([[0, 1], [2, 3]], np.int32)},
        "sequence 1 owns rows 4 to 4",
    ),
    "positions short": ({"positions": ints(0, 1, 2)}, "positions has 3 entries, must have 4"),
    "positions with a gap": ({"positions": ints(0, 1, 3, 4)}, "sequence 0 goes from position 1 to 3"),
    "position negative": ({"positions": ints(-1, 0, 1, 2)}, "sequence 0 starts at position -1"),
    "row too large": ({"rows": ints(0, 4)}, "wanted row 4 is not one of the 4 tokens"),
    "row negative": ({"rows": ints(-1)}, "wanted row -1"),
    "too many rows": ({"rows": ints(*[0] * 49)}, "logits of 49 rows wanted; a step gives at most 48"),
    "no such block": ({"block_tables": np.array([[6, 1]], np.int32)}, "names cache block 6 of 6"),
    "no block": ({"block_tables": np.array([[-1, 1]], np.int32)}, "names cache block -1 of 6"),
    "table too short": (
        {"positions": ints(14, 15, 16, 17), "block_tables": np.array([[0]], np.int32)},
        "sequence 0 needs 2 cache blocks; its table names 1",
    ),
    "tables of others": ({"block_tables": np.zeros((2, 2), np.int32)}, "block_tables has 2 entries, must have 1"),
    "block written twice": (
        {"starts": ints(0, 2, 4), "positions": ints(0, 1, 0, 1), "block_tables": np.array([[3, 1], [3, 2]], np.int32)},
        "cache block 3 would be written twice, the second time by sequence 1",
    ),
    "wrong dtype": ({"tokens": np.arange(4)}, r"tokens is int64\[4\], must be a contiguous int32 array with 1 axes"),
    "wrong rank": ({"block_tables": ints(0, 1)}, r"block_tables is int32\[2\], must be .* with 2 axes"),
    "strided": (
        {"tokens": np.arange(8, dtype=np.int32)[::2]},
        r"tokens is strided int32\[4\], must be a contiguous int32 array",
    ),
    "a list": ({"tokens": [1, 2, 3, 4]}, "tokens is of type list"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_batches_are_refused_and_do_no_harm(small, changes, message):
    program = native.compile(*small, limits())
    expected = program.step(batch(TOKENS_OF)).logits()
    with pytest.raises(InputError, match=message):
        program.step(changed(**changes))
    np.testing.assert_array_equal(program.step(batch(TOKENS_OF)).logits(), expected)


def test_a_position_past_the_context_is_refused(small):
    program = native.compile(*small, limits(context=32))
    program.step(batch(TOKENS_OF[:4], start=28))
    with pytest.raises(ContextError, match="sequence 0 reaches position 32; the context holds 32 tokens"):
        program.step(batch(TOKENS_OF[:4], start=29))


def test_hidden_states_must_be_there_and_fit():
    graph = tiny_graph()
    program = native.compile(graph.block(0), pack(graph, random_arrays(graph)), limits())
    with pytest.raises(InputError, match=r"starts from hidden states \[4, 24\], none given"):
        program.step(changed())
    with pytest.raises(InputError, match="given width 23"):
        program.step(changed(hidden=np.zeros((4, 23), np.float32)))
    with pytest.raises(InputError, match="hidden has 3 entries, must have 4"):
        program.step(changed(hidden=np.zeros((3, 24), np.float32)))


def test_bad_targets_and_sampling_are_refused(small):
    out = native.compile(*small, limits()).step(batch(TOKENS_OF, rows=[7, 39]))
    with pytest.raises(InputError, match="target 50 of row 1 is not in the vocabulary of 50"):
        out.score(ints(0, 50))
    with pytest.raises(InputError, match="1 targets for 2 wanted rows"):
        out.score(ints(0))
    with pytest.raises(InputError, match="contiguous int32"):
        out.score(np.zeros(2))
    with pytest.raises(InputError, match="sampling has 3 entries for 2 wanted rows"):
        out.sample(sampling(3))
    with pytest.raises(InputError, match="token 50 of a history"):
        out.sample(sampling(2, history=[ints(50), ints()]))
    with pytest.raises(InputError, match="51 top log-probabilities of a vocabulary of 50"):
        out.sample(sampling(2, logprobs=51))
    wrong = sampling(2)
    wrong.seed = np.zeros(2, np.int64)
    with pytest.raises(InputError, match="seed is int64"):
        out.sample(wrong)


def test_divergence_needs_the_same_shape(small):
    graph, weights = small
    one, two = (native.compile(graph, weights, limits()).step(batch(TOKENS_OF, rows=r)) for r in ([1], [1, 2]))
    with pytest.raises(InputError, match=r"divergence of \[2, 50\] from \[1, 50\]"):
        two.divergence(one)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"context": 65}, ContextError, "context of 65 tokens asked for; the model's is 64"),
        ({"block_size": 24}, BackendError, "block_size is 24, must be a multiple of 16"),
        ({"kv_format": "int3"}, BackendError, "kv_format is 'int3', must be"),
        ({"kv_format": ("int8", "int3")}, BackendError, "kv_format is 'int3', must be"),
        ({"kv_format": ("int8", "int4", "f32")}, BackendError, "a cache format is given for 3 layers, the model has 2"),
        ({"kv_format": ()}, BackendError, "a cache format is given for 0 layers, the model has 2"),
        ({"max_tokens": 0}, BackendError, "max_tokens is 0"),
        ({"kv_blocks": -1}, BackendError, "kv_blocks is -1"),
        ({"threads": -1}, BackendError, "threads is -1"),
    ],
)
def test_impossible_limits_are_refused(small, changes, error, message):
    with pytest.raises(error, match=message):
        native.compile(*small, limits(**changes))


def test_impossible_weights_are_refused(small):
    graph, weights = small
    without = {k: v for k, v in weights.items() if k != "blocks.0.q.weight"}
    with pytest.raises(BackendError, match=r"weight 'blocks\.0\.q\.weight' is missing"):
        native.compile(graph, without, limits())
    small_one = formats.get("f32").pack(np.zeros((4, 24), np.float32))
    with pytest.raises(BackendError, match=r"is \[4, 24\], the graph's is \[32, 24\]"):
        native.compile(graph, {**weights, "blocks.0.q.weight": small_one}, limits())
    with pytest.raises(BackendError, match="is a plain array"):
        native.compile(graph, {**weights, "blocks.0.q.weight": np.zeros((32, 24), np.float32)}, limits())
    with pytest.raises(BackendError, match="no value 'nowhere'"):
        native.compile(graph, weights, limits(), keep=["nowhere"])
    with pytest.raises(BackendError, match="instruction set mmx is not available here; this machine runs"):
        native.compile(graph, weights, limits(), isa="mmx")
    with pytest.raises(BackendError, match=r"value 'blocks\.0\.q' was not kept"):
        native.compile(graph, weights, limits()).step(batch(TOKENS_OF)).value("blocks.0.q")


def test_an_op_that_the_core_lacks_is_named(small):
    class Other(Op):
        def widths(self, inputs, weights):
            return inputs

        def formula(self, inputs, weights, span):
            return inputs

    graph, weights = small
    more = (*graph.nodes, Node(Other(), "more", ("logits",), ("more",)))
    with pytest.raises(BackendError, match="the native backend has no op Other"):
        native.compile(replace(graph, nodes=more, output="more"), weights, limits())
