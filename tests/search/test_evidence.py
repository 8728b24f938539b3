"""What is told beside the outcome, each against figures worked out by hand; and files of peers and other text."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from search.test_accelerate import as_fast, files, quick, run, settings  # noqa: F401
from search.test_refine import LARGE, SMALL, Judge, refiner, space

from hasten.compress.recipe import KEEP
from hasten.errors import InputError
from hasten.evaluate import text
from hasten.search import accelerate as flow
from hasten.search import batches, contribution, peers, plots, predict, quality, speed, texts
from hasten.search.cost import Whole
from hasten.search.objective import Objective
from hasten.search.speed import Gain, Speed
from hasten.search.trials import Trials


def gain(ratio: float) -> Speed:
    return Speed(None, *([Gain(ratio, ratio * 0.99, ratio * 1.01)] * 2))


def timed(decode: float, prefill: float = 1000.0) -> SimpleNamespace:
    return SimpleNamespace(decode_tokens_per_second=decode, prefill_tokens_per_second=prefill)


def test_a_prediction_is_the_originals_step_with_other_matrices() -> None:
    """Twelve matrices of 4 seconds and a rest of 52 s: halving all of them makes 76 s of 100."""
    world = space()
    one = refiner(world, Judge(world, 1.0))
    names = [t.name for t in world.tensors]
    for name, choice in (("half", LARGE), ("quarter", SMALL)):
        one.measure(name, dict.fromkeys(names, choice), None)
    one.measure("some", {**dict.fromkeys(names, KEEP), "b.0.w": SMALL}, None)
    runs = {t.name: timed(1 / 100) for t in one.tried}
    truth = {"half": 0.76, "quarter": 0.64, "some": 0.97}
    speeds = {name: gain(1 / share) for name, share in truth.items()}
    found = {p.name: p for p in predict.predictions(one, Objective(), runs, speeds)}
    for name, share in truth.items():
        assert found[name].expected == found[name].composed == pytest.approx(share)  # nothing else is known
        assert found[name].corrected == pytest.approx(share)  # nor did others move
        assert found[name].measured == pytest.approx(share)
        assert found[name].error == pytest.approx(0.0, abs=1e-12)
        assert found[name].low < share < found[name].high
    assert predict.predictions(one, Objective("memory"), runs, speeds) == []


def test_a_prediction_is_corrected_by_whole_models() -> None:
    """In the model the same matrices take 5, 3 and 1.5 s, of 100 s in all: known before any candidate was timed."""
    world = space()
    known = Whole(100.0, {LARGE.format: 1.5, SMALL.format: 1.5}, {"f32": 1.25})
    world = replace(world, costs=known.scaled(world.tensors, world.costs), whole=known)
    one = refiner(world, Judge(world, 1.0))
    names = [t.name for t in world.tensors]
    one.measure("half", dict.fromkeys(names, LARGE), None)
    one.measure("some", {**dict.fromkeys(names, KEEP), "b.0.w": SMALL}, None)
    runs = {t.name: timed(1 / 90) for t in one.tried}  # the machine was faster by then: a ratio does not change
    speeds = {"half": gain(1 / 0.7), "some": gain(1 / 0.965)}
    half, some = predict.predictions(one, Objective(), runs, speeds)
    assert (half.composed, half.expected) == pytest.approx((1 - 12 * 2 / 100, 1 - 12 * 2 / 100))
    assert (some.composed, some.expected) == pytest.approx((1 - 3 / 100, 1 - 3.5 / 100))
    assert half.measured == pytest.approx(0.7)
    assert (half.corrected, half.error) == (half.expected, pytest.approx(0.76 / 0.7 - 1))  # none of the same rounds


def test_a_prediction_moves_with_the_others_of_its_rounds() -> None:
    """All of them take a fifth more than expected beside the original; another round's candidate says nothing."""
    world = space()
    one = refiner(world, Judge(world, 1.0))
    names = [t.name for t in world.tensors]
    one.measure("half", dict.fromkeys(names, LARGE), None)
    one.measure("quarter", dict.fromkeys(names, SMALL), None)
    one.measure("some", {**dict.fromkeys(names, KEEP), "b.0.w": SMALL}, None)
    one.measure("apart", {**dict.fromkeys(names, KEEP), "b.1.w": LARGE}, None)
    together, alone = timed(1 / 100), timed(1 / 100)
    runs = {"half": together, "quarter": together, "some": together, "apart": alone}
    truth = {"half": 0.76 * 1.2, "quarter": 0.64 * 1.2, "some": 0.97 * 1.2, "apart": 0.98 * 2}
    found = predict.predictions(one, Objective(), runs, {name: gain(1 / share) for name, share in truth.items()})
    assert [p.corrected for p in found[:3]] == pytest.approx([truth[p.name] for p in found[:3]])
    assert [p.expected for p in found[:3]] == pytest.approx([0.76, 0.64, 0.97])
    assert [p.error for p in found[:3]] == pytest.approx([1 / 1.2 - 1] * 3)  # of what was known before
    assert found[3].corrected == found[3].expected == pytest.approx(0.98)


def test_the_time_of_a_rate_is_the_rate_of_a_time() -> None:
    for name, batch in (("decode", 1), ("decode", 8), ("prefill", 1), ("throughput", 4)):
        objective = Objective(name, batch, prompt=100, new=20)
        run = timed(50.0, 2000.0)
        took = predict.seconds(run, objective)
        expected = {"decode": batch / 50, "prefill": 100 / 2000, "throughput": 4 * 100 / 2000 + 20 * 4 / 50}[name]
        assert took == pytest.approx(expected)
        assert predict.seconds_at(speed.rate(run, objective), objective) == pytest.approx(took)


def test_a_share_put_back_is_what_it_cost() -> None:
    """In a world where losses add up, each choice's contribution is the sum of its matrices' losses."""
    world = space(6)
    one = refiner(world, Judge(world, 1.0))
    choices = {t.name: (SMALL if i < 4 else LARGE if i < 5 else KEEP) for i, t in enumerate(world.tensors)}
    chosen = one.measure("chosen", choices, None)
    real = one.judge.read

    def read(name, facts, weights):
        """Nearest rounding loses twice as much."""
        plain = {n for n, (_, method) in facts.items() if method == "nearest"}
        (found,) = real(name, {n: [f, "clip" if n in plain else m] for n, (f, m) in facts.items()}, weights)
        more = sum(world.losses[i][2 if i < 4 else 1] for i, t in enumerate(world.tensors) if t.name in plain)
        return (replace(found, estimate=found.estimate + more),)

    one.judge.read = read
    first, second = contribution.contributions(one, chosen)
    assert (first.format, first.matrices, second.format, second.matrices) == ("int4-g64", 4, "int8-g64", 1)
    losses = [world.losses[i][2] for i in range(4)]
    assert chosen.reading.estimate - first.without.estimate == pytest.approx(sum(losses))
    assert first.nearest.estimate - chosen.reading.estimate == pytest.approx(sum(losses))
    assert first.cost_saved == pytest.approx(4 * 3.0)
    assert second.cost_saved == pytest.approx(2.0)
    whole = 6 * 64 * 64 * 4
    assert whole - chosen.bytes == first.bytes_saved + second.bytes_saved
    one.enough_time = lambda: False
    assert contribution.contributions(one, chosen) == []


def test_where_a_choice_turns_slower() -> None:
    def rows(*gains: float):
        return [
            {"batch": 4**i, "decode_gain": {"estimate": g, "low": g - 0.05, "high": g + 0.05}}
            for i, g in enumerate(gains)
        ]

    assert "faster than the original's at every batch size measured (1, 4)" in batches.turning(rows(2.0, 1.5))
    assert "slower than the original's from batch 16 on" in batches.turning(rows(2.0, 1.5, 0.8, 0.7))
    assert "not certainly faster than the original's at batch 4" in batches.turning(rows(2.0, 1.01))
    assert batches.turning([]) == ""


def test_the_frontier() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.5, 4.0), (3.0, 3.0), (4.0, 1.0), (1.0, 6.0)]
    best = plots.frontier(points)
    beaten = [p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert sorted(best + beaten) == sorted(points)


def report(**changes) -> dict:
    found = {
        "machine": {"cpu": "a cpu"},
        "model": {"parameters": 94528},
        "engines": {"llama.cpp Q4_0": {"step_bytes": 5e6}, "hasten int4-g32": {"step_bytes": 6e6}},
        "workloads": [
            {
                "name": "decode-1",
                "engines": {
                    "llama.cpp Q4_0": {"median": 900.0, "unit": "tokens/s"},
                    "hasten int4-g32": {"median": 1200.0, "unit": "tokens/s"},
                    "openvino": {"error": "not measured"},
                },
            }
        ],
    }
    return {**found, **changes}


def test_peers_points(tmp_path, files, monkeypatch) -> None:  # noqa: F811
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report()))
    found = peers.read(path)
    assert found["points"][0] == {"engine": "llama.cpp Q4_0", "bytes": 5e6, "decode": 900.0}
    assert len(found["points"]) == 2
    as_fast(2.0, monkeypatch)
    other = tmp_path / "other.txt"
    other.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    outcome, notes = run(settings(files, tmp_path / "fast", budget="ppl=5%", peers=path, other=other))
    assert not any("parameters" in note for note in notes)
    page = (tmp_path / "fast" / "report.html").read_text()
    assert "Beside other engines" in page
    assert "llama.cpp Q4_0: 5, 900" in page
    document = outcome.document
    assert [o["text"] for o in document["other"]] == [str(other)]
    assert document["other"][0]["kl_divergence"] > 0
    assert len(document["batches"]) == 2
    assert len(document["predictions"]) == len([c for c in document["candidates"] if c["speedup"]]) > 1
    assert document["contributions"]
    for title in ("What bought what", "Quality on text of another domain", "At other batch sizes", "Times predicted"):
        assert title in page
        assert title in (tmp_path / "fast" / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "not valid JSON"),
        ("[]", "no report of"),
        (json.dumps({}), "no report of"),
        (json.dumps(report(engines={})), "no report of"),
        (json.dumps(report(workloads=[])), "has not measured decode-1"),
        (json.dumps(report(workloads=[{"name": "decode-1", "engines": {}}])), "no engine's figure"),
        (json.dumps(report(engines={"llama.cpp Q4_0": {"step_bytes": -1}})), "make no sense"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_are_no_report(content: str, said: str, tmp_path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(InputError, match=said):
        peers.read(tmp_path / "r.json")
    with pytest.raises(InputError, match="cannot read"):
        peers.read(tmp_path / "none.json")


def test_other_text_that_is_none(files, tmp_path) -> None:  # noqa: F811
    for content, said in ((b"short", "too short: 5 tokens"), (b"a\0b" * 900, "binary"), (b"", "empty")):
        (tmp_path / "o.txt").write_bytes(content)
        with pytest.raises(InputError, match=said):
            run(settings(files, tmp_path / "fast", other=tmp_path / "o.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["o.txt"]


def test_a_calibration_text_of_another_kind_is_said(tmp_path, monkeypatch) -> None:
    calibration, search = ([np.full(100, i, np.int32)] for i in range(2))
    said: list[str] = []
    job = SimpleNamespace(
        kv_format="bf16",
        texts=SimpleNamespace(calibration=calibration, search=search),
        key="k", graph=None, original={}, reference=(None, {}), threads=1, report=lambda *a: None, say=said.append,
        stage=lambda name: nullcontext(),
    )  # fmt: skip
    for number, (perplexity, expected) in enumerate([(10.0, 0), (29.0, 0), (31.0, 1), (math.inf, 1)]):

        def score(graph, weights, windows, *others, perplexity=perplexity, **_):
            own = perplexity if windows[0][0] == 0 else 10.0
            return SimpleNamespace(perplexity=own) if math.isfinite(own) else None

        monkeypatch.setattr(quality, "score", score)
        said.clear()
        with Trials(tmp_path / str(number)) as trials:
            flow.compare_texts(job, trials)
        assert len(said) == expected
        assert all("unlike the evaluation text" in text for text in said)


def test_of_a_very_large_file_the_beginning_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 1001)
    path = tmp_path / "t.txt"
    path.write_text("é" * 2000)  # two bytes each: the cut goes through one
    notes: list[str] = []
    assert texts.beginning(path, notes) == "é" * 500
    assert "only the first" in notes[0]
    assert text.read(path) == "é" * 2000
