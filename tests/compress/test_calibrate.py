from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import reference
from hasten.compress import calibrate
from hasten.compress.calibrate import Statistics
from hasten.errors import OutputError


def packed(arrays):
    """Arrays of a graph as the native backend takes them, matrices in f32."""
    return {n: formats.get("f32").pack(a) if a.ndim == 2 else a for n, a in arrays.items()}


@pytest.mark.parametrize("shape", [{}, {"post_norms": True, "pre_norms": False}, {"bias": True, "tied": False}])
def test_moments_are_those_of_the_formulas(shape) -> None:
    graph = tiny_graph(**shape)
    arrays = {n: np.asarray(a, np.float32) for n, a in random_arrays(graph).items()}
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, graph.vocabulary, n).astype(np.int32) for n in (40, 17, 64)]
    found = calibrate.calibrate(graph, packed(arrays), windows, kv_format="bf16")
    assert found.tokens == 121

    exact = {n: a.astype(np.float64) for n, a in arrays.items()}
    made = [reference.values(graph, exact, w) for w in windows]
    linears = [n for n in graph.nodes if type(n.op).__name__ == "Linear"]
    assert {n.weights[0] for n in linears} == set(found.moments)
    for node in linears:
        inputs = np.concatenate([values[node.inputs[0]] for values in made])
        np.testing.assert_allclose(found.moments[node.weights[0]], (inputs**2).mean(axis=0), rtol=2e-2, atol=1e-6)
    for own, values in zip(found.final, made, strict=True):
        np.testing.assert_allclose(own, values[graph.blocks[-1].output], rtol=0.05, atol=0.02)


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    statistics = Statistics({"a.b/c": np.arange(3.0)}, 7, [np.ones((2, 4), np.float32), np.zeros((1, 4), np.float32)])
    statistics.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert loaded.tokens == 7
    assert list(loaded.moments) == ["a.b/c"]
    np.testing.assert_array_equal(loaded.moments["a.b/c"], np.arange(3.0))
    assert [f.shape for f in loaded.final] == [(2, 4), (1, 4)]
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]
    with pytest.raises(OutputError, match="cannot write"):
        statistics.save(tmp_path / "absent" / "s.npz")
