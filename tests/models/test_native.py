"""Every architecture on the native backend, in float32: equal to transformers' logits, however the tokens are fed."""

from __future__ import annotations

import numpy as np
import pytest
from models import tiny
from models.make_golden import GOLDEN

from hasten import formats, models
from hasten.backends import feed
from hasten.graph.graph import Graph

native = pytest.importorskip("hasten.backends.native")
CASES = sorted(tiny.CONFIGS)


def native_logits(graph: Graph, chunk: int) -> np.ndarray:
    """[tokens, vocabulary], fed `chunk` tokens at a time through the cache."""
    pack = formats.get("f32").pack
    weights = {n: pack(w) if w.ndim == 2 else w for n, w in tiny.weights(graph).items()}
    limits = feed.window_limits(len(tiny.TOKENS), chunk, kv_format="f32", threads=1)
    program = native.compile(graph, weights, limits)
    steps = feed.windows([tiny.TOKENS.astype(np.int32)], limits)
    return np.concatenate([program.step(batch).logits() for *_, batch in steps])


@pytest.mark.parametrize("name", CASES)
def test_logits_match_golden_whole_cached_and_chunked(name: str) -> None:
    graph = models.build(tiny.CONFIGS[name], tiny.context(name))
    whole = native_logits(graph, len(tiny.TOKENS))
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    assert np.abs(whole[tiny.ROWS] - expected).max() <= 1e-4 * np.abs(expected).max()
    for chunk in (1, 7, 16):  # token by token is what generation does
        assert np.array_equal(native_logits(graph, chunk), whole)
