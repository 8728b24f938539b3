"""Shapes to search from: measured as numpy would, kept where they are faster and lose little, refused with figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from search.test_accelerate import as_fast, files, quick, run, settings  # noqa: F401
from search.tiny_model import write_model, write_text

from hasten import checkpoint
from hasten.backends import reference
from hasten.compress import restructure, structure_recipe
from hasten.compress.recipe import KEEP, Choice
from hasten.graph.functions import softmax
from hasten.graph.structure import Narrow, Structure, restructured
from hasten.search import cost, job, structures
from hasten.search.budget import parse_all
from hasten.search.candidates import tensors
from hasten.search.refine import Space
from hasten.search.trials import Trials

RECIPES = {
    "narrow": {"feed_forward": {"keep": 64}},
    "shallow": {"drop_blocks": [1]},
    "whole": {"feed_forward": {"keep": "100%"}},
    "impossible": {"drop_blocks": {"count": 2}},
}


@pytest.fixture
def made(quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """A job; a matrix takes a second for each of its rows."""
    monkeypatch.setattr(cost, "seconds", lambda site, *_: float(site.shape[0]))
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text", 12000)
    asked = job.Settings(str(model), tmp_path / "out", budget="kl=50", eval=text)
    return job.prepare(asked, lambda *a: None, lambda text: None)


def test_measured_whole_on_text_that_was_held_out(made, tmp_path: Path) -> None:
    with Trials(tmp_path / "work") as trials:
        found = {s.name: s for s in structures.candidates(made, trials, RECIPES)}
        assert sorted(found) == ["narrow", "shallow"]  # one is left as it was, and both blocks cannot go
        shallow = found["shallow"]
        graph = restructured(made.graph, Structure((1,)))
        dense = reference.dense_weights(made.original)
        _, held_out = structures._split(made)
        rows = []
        for window in held_out:
            p, q = (softmax(reference.forward(g, dense, window)) for g in (made.graph, graph))
            rows.append((p * (np.log(p) - np.log(q))).sum(axis=1)[:-1])
        assert shallow.loss == pytest.approx(np.concatenate(rows).mean(), rel=0.02)
        before = sum(m.shape[0] for m in made.graph.matrices() if "embed" not in m.name)
        after = sum(m.shape[0] for m in graph.matrices() if "embed" not in m.name)
        assert shallow.cost == pytest.approx(after / before)
        assert shallow.refused is None
        assert shallow.model.structure == shallow.structure == Structure((1,))
        assert found["narrow"].model.graph.parameters() / made.graph.parameters() == found["narrow"].parameters


def test_refused_with_figures_and_remembered(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(made, budget=parse_all("kl=0.0001"))
    with Trials(tmp_path / "work") as trials:
        first = structures.candidates(made, trials, RECIPES)
        assert all("it loses" in (s.refused or "") and "0.0001" in (s.refused or "") for s in first)
        with monkeypatch.context() as patch:
            patch.setattr(structures, "_made", None)  # nothing is made twice
            again = structures.candidates(made, trials, RECIPES)
        assert [s.json() for s in again] == [s.json() for s in first]
        monkeypatch.setattr(cost, "seconds", lambda site, *_: 1.0)
        factored = {"factored": {"low_rank": {"match": "*.mlp.*", "keep": "50%"}}}
        slow = structures.candidates(replace(made, kernels=["another"]), trials, factored)
        assert "of the original's time" in (slow[0].refused or "")  # two matrices for one, each as slow


def test_a_restructured_artifact_is_accelerated_like_any_model(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    model = checkpoint.open(str(files[0]))
    shape = {
        "feed_forward": {"keep": 64, "blocks": [0]},
        "low_rank": [{"match": "*.1.mlp.up*", "rank": 20}, {"match": "lm_head.weight", "keep": "70%"}],
    }
    plan = structure_recipe.parse(shape).plan(model.graph, model.structure)
    work = restructure.Run([np.arange(200, dtype=np.int32)], "f32")
    small, weights = restructure.compress(model, plan, {}, work, tmp_path / "work")
    source = checkpoint.write_artifact(tmp_path / "small", small, weights, {}, {})
    outcome, _ = run(settings((source, files[1]), tmp_path / "fast", budget="ppl=5%"))
    assert outcome.output, outcome.reason
    made = checkpoint.open(str(outcome.output))
    assert made.structure == small.structure
    assert made.graph.weights["model.layers.1.mlp.up_proj.weight.left"].shape == (96, 20)
    assert set(made.formats.values()) > {"f32"}


def test_what_a_shape_promises_weighs_its_loss(made) -> None:
    """What is left of a matrix costs its share; what the shape loses is missing for packing."""
    found = [t for t in tensors(made.graph, made.original) if t.linears]
    found = [replace(t, choices=(KEEP, Choice("int8-g64", "clip"), Choice("int4-g64", "clip"))) for t in found]
    costs = [[4.0 * t.parameters, 2.0 * t.parameters, 1.0 * t.parameters] for t in found]
    space = Space(found, costs, [[0.0, 1e-6, 1e-3]] * len(found))
    count, total = len(found), sum(t.parameters for t in found)
    nats = 1e-3 * count / structures.USED * 1.0001
    promise = partial(structures.promise, space, made.graph)
    assert space.cost(structures.likely(space, nats)) == total
    halves = Structure(narrowed={block: Narrow(feed_forward=64) for block in range(2)})
    after = restructured(made.graph, halves)
    left = sum(m.shape[0] * m.shape[1] for m in after.matrices() if m.name in {t.name for t in found})
    assert promise(halves, 0.0, nats) == pytest.approx(left / total)
    one_less = promise(halves, 0.6e-3, nats)  # the cheapest of all matrices must be in eight bits
    assert left / total < one_less < left / total * 1.1
    assert promise(halves, 1.1 * nats, nats) == float("inf")
    shallow = Structure((1,))
    gone = sum(t.parameters for t in found if t.block == 1)
    assert promise(shallow, 0.0, nats) == pytest.approx((total - gone) / total)
    assert promise(shallow, 2e-3, nats) == pytest.approx((total - gone) / total)  # its own matrices lose nothing now
