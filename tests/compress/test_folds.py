"""Folds: the same function in other numbers, and less lost when those are rounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from search.tiny_model import write_model, write_text
from support import random_arrays, tiny_graph

from hasten import checkpoint, formats
from hasten.backends import reference
from hasten.cli.main import main
from hasten.compress import folds
from hasten.compress.folds import awq, hadamard, smoothquant
from hasten.compress.methods import Inputs
from hasten.compress.recipe import Choice, parse
from hasten.errors import ConfigError, InputError

SHAPES = [
    {"tied": False},
    {"tied": True, "bias": True},
    {"tied": False, "head_norms": True},
    {"post_norms": True, "pre_norms": False},
    {"tied": False, "kv_heads": 4, "hidden": 32},
]


def model(shape, seed: int = 0):
    graph = tiny_graph(**shape)
    arrays = random_arrays(graph, seed)
    rng = np.random.default_rng(seed)
    for spec in graph.weights.values():  # some features of the stream are large, as in trained models
        if spec.shape == (graph.hidden,):
            arrays[spec.name] = np.exp(rng.normal(size=graph.hidden))
    return graph, {n: a.astype(np.float32) for n, a in arrays.items()}


def logits(graph, arrays, seed: int = 0):
    tokens = np.random.default_rng(seed).integers(0, graph.vocabulary, 30)
    return reference.forward(graph, {n: a.astype(np.float64) for n, a in arrays.items()}, tokens)


def inputs_of(graph, arrays):
    """Of every linear, over random tokens, by the formulas in float64."""
    exact = {n: a.astype(np.float64) for n, a in arrays.items()}
    tokens = np.random.default_rng(1).integers(0, graph.vocabulary, 60)
    values = reference.values(graph, exact, tokens)
    found = {}
    for node in graph.nodes:
        if type(node.op).__name__ == "Linear":
            x = values[node.inputs[0]]
            size = np.abs(x)
            found[node.weights[0]] = Inputs((x**2).mean(0), size.mean(0), size.max(0), x.T @ x / len(x))
    return found


def folded(name: str, graph, arrays, format: str):
    """All blocks in turn, or the whole, as compress does it."""
    found = folds.get(name)
    choices = {spec.name: Choice(format, "nearest") for spec in graph.matrices()}
    if found.WHOLE:
        return found.fold(graph, arrays.__getitem__, lambda _: None, choices)
    known = inputs_of(graph, arrays)
    new = {}
    for index in range(len(graph.blocks)):
        new |= found.fold(graph.block(index), arrays.__getitem__, known.get, choices)
    return new


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "format"), [("awq", "int3-g32"), ("smoothquant", "int8-g32"), ("hadamard", "int4-g32")]
)
def test_a_folded_model_computes_the_same(name: str, format: str, shape) -> None:
    graph, arrays = model(shape)
    new = folded(name, graph, arrays, format)
    assert new
    assert set(new) <= set(arrays)
    changed = [n for n in new if not np.array_equal(new[n], arrays[n])]
    assert changed
    np.testing.assert_allclose(logits(graph, arrays | new), logits(graph, arrays), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[:1])
def test_awq_loses_less_and_finds_what_its_paper_says(shape) -> None:
    graph, arrays = model(shape)
    known = inputs_of(graph, arrays)
    format = formats.get("int3-g32")
    choices = {spec.name: Choice(format.name, "nearest") for spec in graph.matrices()}
    seam = next(s for s in folds.seams(graph.block(0)) if s.before.name.endswith("attention_norm"))
    assert [n.rsplit(".", 2)[1] for n in seam.readers] == ["q", "k", "v"]
    found = awq.search(seam, arrays.__getitem__, known[seam.readers[0]], choices)

    def lost(scales) -> float:
        """On raw inputs, as eq. 4 has it."""
        hessian = known[seam.readers[0]].hessian
        total = 0.0
        for name in seam.readers:
            w = arrays[name].astype(np.float64)
            d = format.pack((w * scales).astype(np.float32)).dense() / scales - w
            total += float(np.trace(d @ hessian @ d.T))
        return total

    mean = known[seam.readers[0]].magnitudes
    tried = []
    for a in np.arange(20) / 20:
        scales = mean**a
        tried.append(scales / np.sqrt(scales.max() * scales.min()))
    best = min(tried, key=lost)
    np.testing.assert_allclose(found, best, rtol=1e-3)
    assert lost(found) < 0.9 * lost(np.ones_like(mean))


def test_smoothquant_is_its_formula() -> None:
    graph, arrays = model({"tied": False})
    known = inputs_of(graph, arrays)
    new = folded("smoothquant", graph, arrays, "int8-g64")
    seam = next(s for s in folds.seams(graph.block(0)) if s.before.name.endswith("attention_norm"))
    weights = np.max([np.abs(arrays[n]).max(axis=0) for n in seam.readers], axis=0)
    scales = np.sqrt(known[seam.readers[0]].peaks / weights)
    np.testing.assert_allclose(new[seam.readers[1]], arrays[seam.readers[1]] * scales, rtol=1e-4)
    np.testing.assert_allclose(new[seam.before.weights[0]], arrays[seam.before.weights[0]] / scales, rtol=1e-4)
    assert not folded("smoothquant", graph, arrays, "int4-g32")
    assert smoothquant.STRENGTH == 0.5


@pytest.mark.parametrize("size", [1, 8, 24, 64, 112])
def test_rotations_are_orthogonal_and_spread(size: int) -> None:
    turn = hadamard.matrix(size)
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-12)
    if size == 64:
        np.testing.assert_allclose(np.abs(turn), 1 / 8)


def test_a_rotation_takes_outliers_out_of_weights() -> None:
    """A few features of the stream are ten times the others': rounding in groups loses less after a rotation."""
    graph, arrays = model({"tied": False, "hidden": 32})
    rng = np.random.default_rng(0)
    for name in ("blocks.0.q.weight", "blocks.0.v.weight"):
        arrays[name][:, rng.choice(32, 2, replace=False)] *= 10
    new = folded("hadamard", graph, arrays, "int4-g32")
    name, format = "blocks.0.q.weight", formats.get("int4-g32")

    def lost(values) -> float:
        return float(((format.pack(values).dense() - values) ** 2).sum() / (values**2).sum())

    assert lost(new[name]) < 0.5 * lost(arrays[name])


def test_where_the_stream_cannot_be_rotated_only_values_are() -> None:
    for shape, why in (({"tied": True}, "used in more places than one"), (SHAPES[3], "stands between|without a norm")):
        graph, arrays = model(shape)
        with pytest.raises(ConfigError, match=why):
            hadamard.Stream(graph)
        new = folded("hadamard", graph, arrays, "int4-g32")
        assert {n.rsplit(".", 2)[1] for n in new} == {"v", "o"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "tiny"), write_text(folder / "text.txt")


@pytest.mark.parametrize("fold", ["[awq]", "[hadamard]", "[hadamard, awq]", "[smoothquant]"])
def test_a_recipe_with_folds(files, tmp_path, capsys, fold: str) -> None:
    """What is left as it is says what the original says; the rest is packed."""
    text = f"fold: {fold}\ntensors:\n  - {{match: '*.mlp.*', format: int4-g32, method: nearest}}\n"
    text += "  - {match: '*_proj.weight', format: int8-g64}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    out = tmp_path / "out"
    command = ["compress", str(files[0]), "-o", str(out), "--recipe", str(tmp_path / "recipe.yaml"), "--json"]
    assert main([*command, "--calibration", str(files[1])]) == 0
    assert json.loads((out / "hasten.json").read_text())["recipe"]["fold"] == list(parse(text).folds)
    capsys.readouterr()
    assert main(["eval", str(out), "--reference", str(files[0]), "--data", str(files[1]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl_divergence"] < 0.3  # of random weights in four bits; a wrong fold gives several nats


def test_wrong_folds(files, tmp_path, capsys) -> None:
    with pytest.raises(InputError, match="must be a list of different names"):
        parse("fold: awq\ntensors: [{match: '*', format: int8-g64}]")
    with pytest.raises(InputError, match="must be a list of different names"):
        parse("fold: [awq, awq]\ntensors: [{match: '*', format: int8-g64}]")
    (tmp_path / "recipe.yaml").write_text("fold: [magic]\ntensors: [{match: '*', format: int4-g64}]")
    command = ["compress", str(files[0]), "-o", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(command) == 2
    assert "unknown fold 'magic'" in capsys.readouterr().err
    assert checkpoint.open(str(files[0])).kind == "huggingface"
