"""Every architecture against transformers: golden logits everywhere, the live comparison where transformers is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny
from models.make_golden import GOLDEN, transformers_logits
from support import need_shared_data

from hasten import models
from hasten.backends import reference
from hasten.errors import ConfigError
from hasten.graph.graph import Graph

CASES = sorted(tiny.CONFIGS)
HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def built(name: str) -> Graph:
    return models.build(tiny.CONFIGS[name], tiny.context(name))


def our_logits(graph: Graph, tokens: np.ndarray = tiny.TOKENS) -> np.ndarray:
    weights = {n: w.astype(np.float64) for n, w in tiny.weights(graph).items()}
    return np.asarray(reference.forward(graph, weights, tokens))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_every_architecture_has_a_case() -> None:
    assert {str(c["model_type"]) for c in tiny.CONFIGS.values()} == set(models.supported())


@pytest.mark.parametrize("name", CASES)
def test_logits_match_golden(name: str) -> None:
    with np.load(GOLDEN) as golden:
        assert_close(our_logits(built(name))[tiny.ROWS], golden[name])


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="torch and transformers are not installed")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_logits_match_transformers(name: str) -> None:
    assert_close(our_logits(built(name)), transformers_logits(tiny.CONFIGS[name], tiny.TOKENS))


@pytest.mark.parametrize("name", CASES)
def test_logits_depend_on_the_past_alone(name: str) -> None:
    graph = built(name)
    changed = tiny.TOKENS.copy()
    changed[30] = (changed[30] + 1) % 48
    before, after = our_logits(graph), our_logits(graph, changed)
    assert np.array_equal(before[:30], after[:30])
    assert not np.allclose(before[30:], after[30:])


@pytest.mark.parametrize("name", CASES)
def test_graph_is_well_formed(name: str) -> None:
    """Blocks are contiguous, cover what lies between embed and rows, and every weight is used."""
    graph = built(name)
    made = {"tokens"}
    for node in graph.nodes:
        assert set(node.inputs) <= made
        made |= set(node.outputs)
    assert {w for n in graph.nodes for w in n.weights} == set(graph.weights)
    assert [b.start for b in graph.blocks[1:]] == [b.stop for b in graph.blocks[:-1]]
    assert graph.nodes[graph.blocks[-1].stop].name == "rows"
    assert all(b.output == n.input for b, n in zip(graph.blocks, graph.blocks[1:], strict=False))


def both_spellings() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(as transformers 4 writes it, as transformers 5 writes it)"""
    base = {k: v for k, v in tiny.CONFIGS["llama"].items() if k != "rope_theta"}
    scaling = {"rope_type": "llama3", **tiny.LLAMA3}
    phi = {k: v for k, v in tiny.CONFIGS["phi3-partial"].items() if k not in ("rope_scaling", "partial_rotary_factor")}
    gemma = {k: v for k, v in tiny.CONFIGS["gemma3_text"].items() if k not in ("rope_theta", "rope_local_base_freq")}
    local = {"rope_type": "default", "rope_theta": 500.0}
    return [
        (
            {**base, "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float16"},
            {**base, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float16"},
        ),
        (
            {**base, "rope_theta": 5e5, "rope_scaling": scaling},
            {**base, "rope_parameters": {**scaling, "rope_theta": 5e5}},
        ),
        (
            tiny.CONFIGS["phi3-partial"],
            {
                **phi,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "partial_rotary_factor": 0.5,
                    "rope_theta": 1e4,
                    **tiny.HALF_LONGROPE,
                },
            },
        ),
        (
            {**gemma, "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                **gemma,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": local,
                },
            },
        ),
    ]


@pytest.mark.parametrize(("old", "new"), both_spellings())
def test_both_spellings_of_a_config_build_the_same_graph(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert models.build(old) == models.build(new)
    assert models.build(old) != models.build({**old, "rope_theta": 77.0, "rope_local_base_freq": 77.0})


def test_longrope_follows_the_context() -> None:
    config = tiny.CONFIGS["phi3-longrope-long"]
    assert models.build(config, 16) != models.build({**config}, 17)
    short, long = (our_logits(models.build(config, c), tiny.TOKENS[:16]) for c in (16, 64))
    assert not np.allclose(short, long, atol=1e-2)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [m for m in models.supported() if m != "gemma3"])
def test_missing_fields_take_the_defaults_of_transformers(model_type: str) -> None:
    """An all but empty config gives the shapes of transformers' own default config."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type)
    stated = {k: v for k, v in theirs.to_dict().items() if k not in ("dtype", "torch_dtype")}
    assert models.build({"model_type": model_type}) == models.build({**stated, "model_type": model_type})


def real_configs() -> list[Path]:
    from support import shared_data

    folder = shared_data("configs")
    return sorted(folder.glob("*.json")) if folder else []


@pytest.mark.parametrize("path", real_configs(), ids=lambda p: p.stem)
def test_published_configs_build_or_are_refused_by_name(path: Path) -> None:
    config = json.loads(path.read_text())
    if config["model_type"] in models.supported():
        graph = models.build(config)
        assert len(graph.blocks) == config["num_hidden_layers"]
        assert graph.vocabulary == config["vocab_size"]
    else:
        with pytest.raises(ConfigError, match=f"'{config['model_type']}' is not supported") as refused:
            models.build(config)
        assert all(name in str(refused.value.hint) for name in models.supported())


def test_published_sizes() -> None:
    """Parameter counts as their model cards state them."""
    folder = need_shared_data("configs")
    for name, millions in {
        "llama3_1_8b": 8030,
        "qwen2_0_5b": 494,
        "qwen3_0.6b": 596,
        "gemma2_2b": 2614,
        "gemma3_1b_it": 1000,
        "phi-3_5": 3821,
        "olmo2_7b": 7299,
        "mistral_7b": 7242,
        "smollm2_135m": 135,
    }.items():
        graph = models.build(json.loads((folder / f"{name}.json").read_text()))
        assert round(graph.parameters() / 1e6) == millions
