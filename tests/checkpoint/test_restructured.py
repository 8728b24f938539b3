"""Artifacts of restructured models: the structure travels in hasten.json and is checked like all else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from models import tiny

from hasten import LLM, SamplingParams, checkpoint, formats, models
from hasten.backends import reference
from hasten.backends.batch import Limits
from hasten.backends.native import compile
from hasten.checkpoint.gguf import write_gguf
from hasten.checkpoint.model import Model
from hasten.cli import inspect
from hasten.engine import memory
from hasten.errors import CheckpointError
from hasten.graph.structure import LowRank, Narrow, Structure, restructured

DOWN, Q = (f"model.layers.0.{part}.weight" for part in ("mlp.down_proj", "self_attn.q_proj"))
STRUCTURE = Structure((1,), {0: Narrow(2, 1, 70)}, {DOWN: LowRank(11), Q: LowRank(6, True)})


def restructure(model: Model, structure: Structure) -> Model:
    return replace(model, graph=restructured(model.graph, structure), structure=structure)


def random_weights(model: Model) -> dict[str, Any]:
    made = {spec.name: tiny.tensor(spec.name, spec.shape) for spec in model.graph.weights.values()}
    return {name: formats.get("int8-g32").pack(v) if v.ndim == 2 else v for name, v in made.items()}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = small_model.write(tmp_path / "original", num_hidden_layers=3)
    return restructure(checkpoint.open(str(folder)), STRUCTURE)


@pytest.fixture
def artifact(tmp_path: Path, model: Model) -> Path:
    return checkpoint.write_artifact(tmp_path / "small", model, random_weights(model), {}, {})


def test_round_trip(artifact: Path, model: Model) -> None:
    opened = checkpoint.open(str(artifact))
    assert (opened.structure, opened.graph) == (STRUCTURE, model.graph)
    assert opened.facts["blocks"][0] == {"attention": {"heads": 2, "kv_heads": 1, "head_dim": 16}, "feed_forward": 70}
    assert len(opened.facts["blocks"]) == len(opened.graph.blocks) == 2
    at = opened.at_context(64)
    assert (at.graph, at.structure) == (restructured(models.build(model.config, 64), STRUCTURE), STRUCTURE)
    assert checkpoint.open(str(artifact), weights=False).graph == model.graph
    checkpoint.verify(artifact)


def test_it_is_served_as_the_formulas_say(artifact: Path) -> None:
    opened = checkpoint.open(str(artifact)).at_context(128)
    ids = opened.tokenizer.encode("once upon a time")
    dense = reference.dense_weights(opened.weights())
    expected = reference.forward(opened.graph, dense, np.array(ids))[-1]
    (answer,) = LLM(artifact, context=128).generate([ids], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert answer.outputs[0].token_ids == [int(np.argmax(expected))]


def test_memory_is_what_was_predicted(model: Model) -> None:
    limits = Limits(context=512, threads=2, kv_blocks=16, kv_format="int8")
    taken = compile(model.graph, random_weights(model), limits).memory()
    stored = dict.fromkeys((m.name for m in model.graph.matrices()), "int8-g32")
    predicted = memory.predict(model.graph, memory.weight_bytes(model.graph, stored), limits, stored)
    assert predicted.weights == taken["weights"]
    assert predicted.kv_cache == taken["kv_cache"]
    assert predicted.buffers == pytest.approx(taken["buffers"], rel=0.1)


def test_inspect_says_so(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.run(inspect.Options(str(artifact), graph=True))
    shown = capsys.readouterr().out
    departures = "block 1 dropped; 1 block narrowed; 1 matrix of low rank; 1 matrix with a low-rank correction"
    assert f"departs from its config.json: {departures}" in shown
    assert "-- block 2" in shown
    assert "model.layers.0.mlp.down_proj.weight.left" in shown
    inspect.run(inspect.Options(str(artifact), json=True))
    assert json.loads(capsys.readouterr().out)["structure"] == STRUCTURE.json()


def test_an_artifact_without_structure_is_as_it_was(tmp_path: Path) -> None:
    """So an older hasten still reads it."""
    model = checkpoint.open(str(small_model.write(tmp_path / "original")))
    written = checkpoint.write_artifact(tmp_path / "out", model, random_weights(model), {}, {})
    facts = json.loads((written / "hasten.json").read_text())
    assert (facts["format_version"], "structure" in facts) == (1, False)


def test_gguf_cannot_say_it(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="departs from its config"):
        write_gguf(model, tmp_path / "m.gguf")


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"dropped": [0, 1, 2]}, "all 3 blocks are dropped"),
    ({"dropped": [-1]}, "no block -1"),
    ({"dropped": [3]}, "no block 3"),
    ({"dropped": [2]}, "disagree about tensor"),
    ({"dropped": []}, "disagree about tensor"),
    ({"narrowed": {"0": {"heads": 2, "kv_heads": 1, "feed_forward": 71}}}, "block shapes differ"),
    ({"narrowed": {"0": {"heads": 3, "kv_heads": 2, "feed_forward": 70}}}, "cannot share 2 key heads among 3"),
    ({"low_rank": {DOWN: {"rank": 12}, Q: {"rank": 6, "residual": True}}}, r"has shape \[11, 70\], config.json asks"),
    ({"low_rank": {DOWN: {"rank": -11}, Q: {"rank": 6, "residual": True}}}, "cannot have rank -11"),
    ({"low_rank": {DOWN: {"rank": 11}, Q: {"rank": 6}}}, "disagree about tensor"),
    ({"low_rank": {"nothing.weight": {"rank": 1}}}, "'nothing.weight', which this model does not have"),
    ({"low_rank": []}, "low_rank must be an object"),
]


@pytest.mark.parametrize(("fields", "message"), HOSTILE, ids=[m[:40] for _, m in HOSTILE])
def test_hostile_structures_are_refused(artifact: Path, fields: dict[str, Any], message: str) -> None:
    facts = json.loads((artifact / "hasten.json").read_text())
    facts["structure"] |= fields
    (artifact / "hasten.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(str(artifact)).weights()
    assert "small" in caught.value.message
