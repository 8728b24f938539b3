"""A real model: stories260K decodes greedily to its known text, on every instruction set."""

import numpy as np
import pytest
from programs import limits
from support import need_shared_data

from hasten import _native, checkpoint
from hasten.backends import native, reference
from hasten.backends.batch import Batch


def span(ids, start, rows):
    count = len(ids)
    return Batch(
        np.array(ids, np.int32),
        np.arange(start, start + count, dtype=np.int32),
        np.array([0, count], np.int32),
        np.arange(16, dtype=np.int32)[None],
        np.array(rows, np.int32),
    )


@pytest.fixture(scope="module")
def model():
    return checkpoint.open(str(need_shared_data("models", "stories260K-hf")))


@pytest.mark.parametrize("isa", _native.available_isas())
def test_greedy_decoding_gives_the_known_text(model, isa):
    expected = need_shared_data("models", "stories260K", "expected_greedy_200.txt").read_text()
    sizes = limits(context=512, max_tokens=64, kv_blocks=16)
    program = native.compile(model.graph, model.weights(), sizes, isa=isa)
    ids = [1]
    for position in range(200):
        out = program.step(span(ids[-1:], position, [0]))
        ids.append(int(out.argmax()[0]))
    assert model.tokenizer.decode(ids) == expected


def test_logits_are_the_formulas(model):
    weights = model.weights()
    ids = model.tokenizer.encode("Once upon a time, there was a little dog who wanted to fly.")
    program = native.compile(model.graph, weights, limits(context=512, max_tokens=64, kv_blocks=16))
    found = program.step(span(ids, 0, range(len(ids)))).logits()
    expected = reference.forward(model.graph, reference.dense_weights(weights), np.array(ids))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
