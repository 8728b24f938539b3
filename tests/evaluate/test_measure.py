"""Whole models: through the native program against formulas in float64, and against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import need_shared_data, tiny_graph

from hasten import checkpoint
from hasten.backends.reference import dense_weights, forward
from hasten.errors import InputError
from hasten.evaluate import text
from hasten.evaluate.perplexity import measure

GRAPH = tiny_graph()


def windows(lengths: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(0, GRAPH.vocabulary, n).astype(np.int32) for n in lengths]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_equals_the_formulas_in_float64(format: str) -> None:
    cut = windows([40, 40, 13])
    weights, other = (checkpoint.random_weights(GRAPH, format, seed) for seed in (0, 1))
    found = measure(GRAPH, weights, cut, reference=(GRAPH, other), kv_format="f32", threads=2)
    own, away, same = [], [], []
    for window in cut:
        q, p = (log_softmax(forward(GRAPH, dense_weights(w), window.astype(np.int64)))[:-1] for w in (weights, other))
        own += q[np.arange(len(q)), window[1:]].tolist()
        away += (np.exp(p) * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    tolerance = 1e-5 if format == "f32" else 2e-2  # kernels may round activations to bf16 beside bf16 weights
    assert found.perplexity == pytest.approx(np.exp(-np.mean(own)), rel=tolerance)
    assert found.kl_divergence == pytest.approx(np.mean(away), rel=tolerance)
    assert found.top1_agreement == pytest.approx(np.mean(same), abs=0 if format == "f32" else 0.05)
    assert found.tokens == 39 + 39 + 12


def test_an_int8_cache_costs_little_on_the_demo() -> None:
    model = checkpoint.open("demo").at_context(256)
    written = (Path(checkpoint.__file__).parents[1] / "demo" / "fallback.txt").read_text()
    cut = text.windows(model.tokenizer, written, 256)[:4]
    weights = model.weights()
    near = measure(model.graph, weights, cut, reference=(model.graph, weights), kv_format="int8")
    assert near.kl_divergence is not None
    assert 0 < near.kl_divergence < 2e-3
    assert near.top1_agreement is not None
    assert near.top1_agreement > 0.97


def test_vocabularies_must_agree() -> None:
    other = tiny_graph(vocabulary=60)
    weights, others = (checkpoint.random_weights(g, "f32") for g in (GRAPH, other))
    with pytest.raises(InputError, match="vocabulary has 60 tokens, the model's 50"):
        measure(GRAPH, weights, windows([5]), reference=(other, others))


@pytest.mark.slow
def test_perplexity_of_stories260k_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory: Path = need_shared_data("models", "stories260K-hf")
    written = need_shared_data("text", "tinystories", "tinystories.txt").read_text()[:6000]
    model = checkpoint.open(str(directory))
    cut = text.windows(model.tokenizer, written, 200)
    found = measure(model.graph, model.weights(), cut)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    scored = []
    with torch.no_grad():
        for window in cut:
            ids = torch.from_numpy(window.astype(np.int64))[None]
            likely = torch.log_softmax(theirs(ids).logits[0, :-1].double(), -1)
            scored += likely.gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert len(scored) == found.tokens
    assert found.perplexity == pytest.approx(np.exp(-np.mean(scored)), rel=1e-5)
