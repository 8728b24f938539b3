"""The proof's bookkeeping in a world of made-up losses and speeds: which text is looked at, by whom, how often."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from search.test_refine import Judge, refiner, space

from hasten.errors import CheckpointError
from hasten.evaluate import perplexity
from hasten.evaluate.perplexity import Evaluation
from hasten.search import prove as proving
from hasten.search import quality, speed
from hasten.search.budget import parse, parse_all
from hasten.search.objective import Objective
from hasten.search.quality import Reading
from hasten.search.samples import Sample
from hasten.search.speed import Gain, Speed
from hasten.search.trials import Trials

WINDOWS = [[np.full(65, 100 * s + w, np.int32) for w in range(30)] for s in range(3)]
SLICES = [Sample(windows) for windows in WINDOWS]


class World:
    """`losses` of successive looks, in nats (None: output that is not a number); `gains` by rounds and by timing."""

    def __init__(self, monkeypatch, losses) -> None:
        self.losses, self.looks, self.gains, self.timed = list(losses), [], lambda rounds, n: 2.0, 0
        monkeypatch.setattr(perplexity, "measure", self.measure)
        monkeypatch.setattr(speed, "compare", self.compare)

    def measure(self, graph, weights, text, *, reference, threads, report, **_) -> Evaluation:
        self.looks.append({int(w[0]) for w in text})
        loss = self.losses.pop(0)
        if loss is None:
            raise CheckpointError("the model's log-probabilities are not finite")
        noise = np.random.default_rng(0).normal(0, 0.01, (30, 64)).astype(np.float32)
        base = [np.full(64, -2.0, np.float32)] * 30
        own = [b - np.float32(loss) + n for b, n in zip(base, noise, strict=True)]
        return Evaluation(7.4, (7.0, 8.0), 1920, loss, 0.9, own, base, [np.full(64, loss)] * 30)

    def compare(self, graph, original, candidates, *, objective, threads, rounds, report, kv_formats):
        found = []
        for n in range(len(candidates)):
            gain = self.gains(rounds, n)
            found.append(Speed(None, Gain(gain, gain * 0.99, gain * 1.01), Gain(gain, gain * 0.99, gain * 1.01)))
        self.timed += 1
        return None, found


def prove(folder: Path, count: int = 3, objective: str = "decode"):
    budget, notes = parse_all("ppl=1%"), []
    job = SimpleNamespace(
        kv_formats=("auto", "auto"),
        cache="auto",
        key="k",
        budget=budget,
        graph=None,
        original={},
        reference=(None, {}),
        threads=1,
        report=lambda *a: None,
        say=notes.append,
    )
    job.stage = lambda name: nullcontext()
    job.objective, job.original_allowed = Objective(objective), True
    world = space()
    one = refiner(world, Judge(world, 1.0))
    one.uniforms()
    one.search()
    with Trials(folder, keep=True) as trials:
        return proving.prove(job, one, SLICES[:count], trials), notes, trials


def test_each_attempt_takes_other_tokens_and_asks_for_more(tmp_path: Path, monkeypatch) -> None:
    world = World(monkeypatch, [0.02, 0.02, 0.001])
    proof, _, _ = prove(tmp_path)
    assert [a.holds for a in proof.attempts] == [False, False, True]
    assert len(world.looks) == 3
    assert not world.looks[0] & world.looks[1]
    assert not (world.looks[0] | world.looks[1]) & world.looks[2]
    assert [a.reading.level for a in proof.attempts] == [0.95, 0.99, 0.99]
    assert len({a.name for a in proof.attempts}) == 3
    widths = [a.reading.high - a.reading.low for a in proof.attempts]
    assert widths[1] / widths[0] == pytest.approx(2.576 / 1.96, rel=0.1)  # of a normal distribution


def test_a_slice_is_looked_at_once_whatever_the_clock_says(tmp_path: Path, monkeypatch) -> None:
    """Stopped after the first look; the second run's timings prefer another candidate."""
    world = World(monkeypatch, [0.02])
    world.gains = lambda rounds, n: 2.0 - 0.1 * n
    first, _, _ = prove(tmp_path, count=1)
    world.gains = lambda rounds, n: 2.0 + 0.1 * n
    world.losses = [0.001]
    second, _, trials = prove(tmp_path)
    assert world.looks[0] == {int(w[0]) for w in WINDOWS[0]}
    assert world.looks[1:] == [{int(w[0]) for w in WINDOWS[1]}]
    assert second.attempts[0] == first.attempts[0]
    assert trials.reused == 1
    assert second.attempts[1].holds
    third, _, _ = prove(tmp_path)  # and a proof that held holds without a look
    assert third.chosen is not None
    assert third.attempts == second.attempts
    assert len(world.looks) == 2


def test_speed_that_does_not_last_is_not_claimed(tmp_path: Path, monkeypatch) -> None:
    world = World(monkeypatch, [0.001])
    world.gains = lambda rounds, n: 2.0 if rounds == proving.ROUNDS else 1.0
    proof, notes, _ = prove(tmp_path)
    assert proof.chosen is None
    assert "nothing is faster" in proof.reason
    assert world.looks == []  # no text is spent on what is not faster
    assert any("timed again" in n for n in notes)

    again = iter([1.0])
    world.gains = lambda rounds, n: 2.0 if rounds == proving.ROUNDS else next(again, 1.5)
    proof, _, _ = prove(tmp_path)
    assert proof.chosen is not None
    assert proof.reason == ""
    assert proof.final[proof.chosen.name][1].decode.estimate == 1.5
    assert len(world.looks) == 1


def test_a_broken_candidate_is_a_failed_one(tmp_path: Path, monkeypatch) -> None:
    world = World(monkeypatch, [None, 0.001])
    proof, _, _ = prove(tmp_path)
    assert [a.holds for a in proof.attempts] == [False, True]
    assert proof.attempts[0].reading.json()["high"] is None
    again, _, _ = prove(tmp_path)
    assert again.attempts == proof.attempts
    assert len(world.looks) == 2


def test_the_judge_records_a_broken_candidate_and_blames_the_original_for_its_own(tmp_path: Path, monkeypatch) -> None:
    def judge(measure: str, folder: Path, broken: object) -> Reading:
        def scored(graph, weights, windows, *, reference, **_):
            if weights is broken:
                raise CheckpointError("not finite")
            base = [np.full(64, -2.0, np.float32)] * 30
            return Evaluation(7.4, None, 1920, 0.0, 1.0, base, base, [np.zeros(64)] * 30)

        monkeypatch.setattr(perplexity, "measure", scored)
        with Trials(folder, keep=True) as trials:
            one = quality.Judge(None, original, SLICES[0], parse_all(measure), 1, trials, "k", lambda *a: None)
            (found,) = one.read("c", "facts", lambda: candidate)
            assert one.read("c", "facts", lambda: candidate) == (found,)
        return found

    original, candidate = {"o": 1}, {"c": 1}
    for measure in ("ppl=1%", "kl=0.1"):
        found = judge(measure, tmp_path / measure[:2], candidate)
        assert found.estimate == found.high == found.careful(1000) == np.inf
        assert not found.within(parse(measure))
    with pytest.raises(CheckpointError):
        judge("ppl=1%", tmp_path / "other", original)


def test_loss_beyond_what_a_number_holds() -> None:
    """Far more nats a token than exp can show."""
    base = [np.full(64, -2.0, np.float32)] * 30
    found = quality.ratio_reading(base, [w - 2000 for w in base])
    assert found.estimate == np.inf
    assert found.json()["estimate"] is None
