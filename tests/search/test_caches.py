"""Which caches a search gives its candidates, and that all that is measured of them has these caches."""

from __future__ import annotations

import pytest
from search.test_accelerate import as_fast, files, run, settings  # noqa: F401

from hasten import checkpoint
from hasten.evaluate import perplexity
from hasten.formats import Weight
from hasten.search import caches
from hasten.search.speed import Gain


def test_whatever_is_measured_of_candidates_has_the_caches_that_serve_them(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    looked, real = [], perplexity.measure

    def measure(graph, weights, windows, **others):
        same = {w.format.name for w in weights.values() if isinstance(w, Weight)} == {"f32"}
        looked.append((same, others["kv_format"]))
        if others.get("reference"):
            looked.append((True, others["reference_kv_format"]))
        return real(graph, weights, windows, **others)

    monkeypatch.setattr(perplexity, "measure", measure)
    outcome, _ = run(settings(files, tmp_path / "fast", budget=("ppl=5%", "agree=60%")))
    layers = tuple(outcome.document["cache"]["layers"])
    assert outcome.document["cache"]["chosen"]
    assert checkpoint.open(str(tmp_path / "fast")).kv_formats == layers
    alike = layers[0] if len(set(layers)) == 1 else layers
    assert {kv for original, kv in looked if original} == {"f32"}
    assert {kv for original, kv in looked if not original} <= {alike, layers}
    assert len(looked) > 5
    assert "cache:" in (tmp_path / "fast" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("others", "gain", "said"),
    [
        ({}, Gain(1.02, 1.01, 1.03), "it buys too little speed: 1.02 times (1.01 to 1.03)"),
        ({}, Gain(1.5, 0.9, 2.0), "it buys too little speed"),
        ({"objective": "memory"}, None, "the objective counts the bytes of matrices"),
    ],
)
def test_refused_caches_are_told_and_not_used(others, gain, said, files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    monkeypatch.setattr(caches, "timed", lambda *_: gain)
    outcome, _ = run(settings(files, tmp_path / "fast", **{"budget": "ppl=5%", **others}))
    told = outcome.document["cache"]
    assert not told["chosen"]
    assert said in told["refused"]
    assert checkpoint.open(str(tmp_path / "fast")).kv_formats == ()
    page = (tmp_path / "fast" / "report.html").read_text()
    assert "Keys and values in the cache" in page


def test_where_there_is_no_time_that_is_told(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    monkeypatch.setattr(caches, "MOST", 0.0)
    outcome, _ = run(settings(files, tmp_path / "fast", budget="ppl=5%", minutes=5.0))
    assert outcome.document["cache"]["refused"] == "there is no time to measure them"
