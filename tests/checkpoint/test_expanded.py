"""A restructured model exported as the plain one: the same logits, by the formulas of both graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_model
from checkpoint import making
from models import tiny

from hasten import checkpoint, formats
from hasten.backends import reference
from hasten.checkpoint import export
from hasten.checkpoint.expanded import expanded
from hasten.checkpoint.export import Options
from hasten.checkpoint.model import Model
from hasten.errors import CheckpointError
from hasten.graph.structure import LowRank, Narrow, Structure, restructured

MLP = "model.layers.0.mlp.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
DEEP = {"num_hidden_layers": 4}
CONFIGS = {
    **tiny.CONFIGS,
    "eight heads": {**tiny.CONFIGS["qwen2"], "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
}
CASES: dict[str, tuple[str, Structure]] = {
    "a block dropped": ("llama", Structure((1,))),
    "all but one": ("qwen2", Structure((0, 2, 3))),
    "a narrow feed-forward": ("llama-biases", Structure(narrowed={0: Narrow(feed_forward=7)})),
    "one key head": ("llama", Structure(narrowed={1: Narrow(2, 1)})),
    "one head": ("qwen2", Structure(narrowed={1: Narrow(1, 1)})),
    "as many heads on one key head": ("qwen3-bias", Structure(narrowed={1: Narrow(kv_heads=1)})),
    "three heads on one key head": ("llama-tied", Structure(narrowed={1: Narrow(3, 1)})),
    "a head of each pair": ("llama", Structure(narrowed={1: Narrow(2, 2)})),
    "three heads on each of two key heads": ("eight heads", Structure(narrowed={0: Narrow(6, 2), 1: Narrow(3, 3)})),
    "a fused tensor": ("phi3", Structure(narrowed={0: Narrow(2, 1, 9), 1: Narrow(feed_forward=20)})),
    "low rank": ("llama", Structure(low_rank={MLP: LowRank(5), QUERY: LowRank(3)})),
    "low rank beside the matrix": ("qwen2", Structure(low_rank={MLP: LowRank(5, True), QUERY: LowRank(3, True)})),
    "low rank of what is narrow": (
        "qwen3",
        Structure((2,), {0: Narrow(feed_forward=11)}, {MLP: LowRank(4), QUERY: LowRank(2, True)}),
    ),
    "all at once": (
        "llama-linear",
        Structure((2,), {0: Narrow(2, 1, 11), 3: Narrow(kv_heads=1)}, {QUERY: LowRank(2)}),
    ),
    "layers that slide by turns": ("gemma2", Structure((0,))),
    "layers of stated kinds": ("smollm3-sliding", Structure((0,))),
    "layers without rope": ("smollm3", Structure((0, 2))),
}


def restructure(path: Path, name: str, structure: Structure) -> Model:
    """An artifact of a tiny model with this structure; weights that it changes are drawn."""
    config = {**CONFIGS[name]}
    if "layer_types" not in config and "no_rope_layers" not in config:
        config |= DEEP
    original = checkpoint.open(str(making.directory(path / "original", config)))
    graph, rng = restructured(original.graph, structure), np.random.default_rng(1)
    new = {
        n: rng.normal(0, 1.5 * spec.shape[-1] ** -0.5, spec.shape).astype(np.float32)
        for n, spec in graph.weights.items()
        if n not in original.graph.weights or original.graph.weights[n].shape != spec.shape
    }
    packed = {n: formats.get("f32").pack(v) if v.ndim == 2 else v for n, v in new.items()}
    made = original.departing(structure, packed)
    return checkpoint.open(str(checkpoint.write_artifact(path / "a", made, made.weights(), {}, {})))


def logits(model: Model) -> np.ndarray:
    weights = {name: model.tensor(name).astype(np.float64) for name in model.graph.weights}
    return np.asarray(reference.forward(model.graph, weights, tiny.TOKENS))


@pytest.mark.parametrize("how", CASES)
def test_the_plain_model_computes_the_same(how: str, tmp_path: Path) -> None:
    model = restructure(tmp_path, *CASES[how])
    assert model.structure
    written = export.export(model, "hf", tmp_path / "out", Options(dtype="f32"))
    assert "they compute the same" in written.notes[0]
    found = checkpoint.open(str(tmp_path / "out"))
    assert not found.structure
    np.testing.assert_allclose(logits(found), logits(model), rtol=0, atol=1e-5 * np.abs(logits(model)).max())


@pytest.mark.parametrize("how", ["a block dropped", "a narrow feed-forward", "low rank", "all at once"])
def test_transformers_says_the_same(how: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = restructure(tmp_path, *CASES[how])
    export.export(model, "hf", tmp_path / "out", Options(dtype="f32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(tiny.TOKENS[None])).logits[0].numpy()
    expected = logits(model)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("how", CASES)
def test_onnx_takes_any_structure(how: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = restructure(tmp_path, *CASES[how])
    export.export(model, "onnx", tmp_path / "out", Options())
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": tiny.TOKENS[None]})[0][0]
    expected = logits(model)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_dropped_blocks_leave_formats_as_they_are(tmp_path: Path) -> None:
    """So gguf and compressed-tensors take such a model too, exactly; a narrowed one they refuse."""
    original = checkpoint.open(str(small_model.write(tmp_path / "m", num_hidden_layers=3, intermediate_size=128)))
    weights = {n: original.weight(n) for n in original.graph.weights}
    for spec in original.graph.matrices():
        if "embed" not in spec.name:
            weights[spec.name] = formats.get("int4-g32").pack(original.tensor(spec.name))
    made = original.departing(Structure((1,)), {})
    kept = {n: weights[n] for n in made.graph.weights}
    model = checkpoint.open(str(checkpoint.write_artifact(tmp_path / "a", made, kept, {}, {})))
    plain = expanded(model)
    for target, out in (("gguf", "out.gguf"), ("compressed-tensors", "out")):
        export.export(model, target, tmp_path / out, Options())
        found = checkpoint.open(str(tmp_path / out))
        assert len(found.graph.blocks) == 2
        for name in plain.graph.weights:
            if "embed" not in name:
                np.testing.assert_array_equal(found.tensor(name), plain.tensor(name))
                assert name.startswith("model.norm") or found.formats.get(name, "int4-g32") == "int4-g32"
    narrow = restructure(tmp_path / "narrow", *CASES["a narrow feed-forward"])
    for target in ("gguf", "compressed-tensors"):
        with pytest.raises(CheckpointError, match="is no plain llama") as error:
            export.export(narrow, target, tmp_path / "none", Options())
        assert "--to hf" in str(error.value.hint)
    assert not (tmp_path / "none").exists()


def test_heads_that_find_no_room(tmp_path: Path) -> None:
    """Three key heads with three query heads each, where each key head of the five may have two."""
    config = {**tiny.BASE, "model_type": "llama", "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 4}
    original = checkpoint.open(str(making.directory(tmp_path / "original", config)))
    structure = Structure(narrowed={0: Narrow(9, 3)})
    new = {
        name: formats.get("f32").pack(np.ones(spec.shape, np.float32))
        for name, spec in restructured(original.graph, structure).weights.items()
        if spec.shape != original.graph.weights[name].shape
    }
    with pytest.raises(CheckpointError, match="9 heads on 3 key heads, which no block of 10 on 5 holds"):
        export.export(original.departing(structure, new), "hf", tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_a_plain_model_is_left_as_it_is() -> None:
    demo = checkpoint.open("demo")
    assert expanded(demo) is demo
