from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import reference
from hasten.compress import calibrate
from hasten.compress.methods import Inputs
from hasten.compress.statistics import Gatherer, Statistics
from hasten.errors import CheckpointError, OutputError


def packed(arrays):
    """Arrays of a graph as the native backend takes them, matrices in f32."""
    return {n: formats.get("f32").pack(a) if a.ndim == 2 else a for n, a in arrays.items()}


@pytest.mark.parametrize("shape", [{}, {"post_norms": True, "pre_norms": False}, {"bias": True, "tied": False}])
def test_moments_are_those_of_the_formulas(shape) -> None:
    graph = tiny_graph(**shape)
    arrays = {n: np.asarray(a, np.float32) for n, a in random_arrays(graph).items()}
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, graph.vocabulary, n).astype(np.int32) for n in (40, 17, 64)]
    names = [n for n in arrays if arrays[n].ndim == 2]
    found = calibrate.calibrate(graph, packed(arrays), windows, kv_format="bf16", hessians=names)
    assert found.tokens == 121

    exact = {n: a.astype(np.float64) for n, a in arrays.items()}
    made = [reference.values(graph, exact, w) for w in windows]
    linears = [n for n in graph.nodes if type(n.op).__name__ == "Linear"]
    assert {n.weights[0] for n in linears} == set(found.readers)
    for node in linears:
        inputs = np.concatenate([values[node.inputs[0]] for values in made])
        own = found.inputs(node.weights[0])
        assert own is not None
        np.testing.assert_allclose(own.moments, (inputs**2).mean(axis=0), rtol=2e-2, atol=1e-6)
        np.testing.assert_allclose(own.magnitudes, np.abs(inputs).mean(axis=0), rtol=2e-2, atol=1e-6)
        np.testing.assert_allclose(own.peaks, np.abs(inputs).max(axis=0), rtol=5e-2, atol=1e-5)
        size = np.sqrt(own.moments)
        second = inputs.T @ inputs / len(inputs)
        np.testing.assert_allclose(own.hessian / np.outer(size, size), second / np.outer(size, size), atol=2e-2)
    for own, values in zip(found.final, made, strict=True):
        np.testing.assert_allclose(own, values[graph.blocks[-1].output], rtol=0.05, atol=0.02)


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    sites = {
        "x/y": Inputs(np.arange(3.0), np.ones(3), np.full(3, 2.0), np.eye(3, dtype=np.float32)),
        "z": Inputs(np.ones(2)),
    }
    final = [np.ones((2, 4), np.float32), np.zeros((1, 4), np.float32)]
    statistics = Statistics(sites, {"a.b/c": "x/y", "d": "x/y"}, 7, final)
    statistics.spill(tmp_path / "s")
    assert isinstance(statistics.sites["x/y"].hessian, np.memmap)
    statistics.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert loaded.tokens == 7
    assert loaded.inputs("absent") is None
    own = loaded.inputs("d")
    assert own is not None
    for name in ("moments", "magnitudes", "peaks", "hessian"):
        np.testing.assert_array_equal(getattr(own, name), getattr(sites["x/y"], name))
    assert loaded.sites["z"].hessian is None
    assert [f.shape for f in loaded.final] == [(2, 4), (1, 4)]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["hessian-00000.npy", "statistics.npz"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        statistics.save(tmp_path / "file" / "s")


def test_what_is_not_finite_is_named() -> None:
    gatherer = Gatherer({"v": ["some.weight"]})
    gatherer.add("v", np.array([[1.0, np.inf]], np.float32))
    with pytest.raises(CheckpointError, match=r"what flows into 'some\.weight' holds a NaN or an infinity"):
        gatherer.found()
