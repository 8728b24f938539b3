"""Widths by block: the least loss of all cuts, curves that are what removing channels does, recipes that hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search.test_accelerate import quick, settings  # noqa: F401
from search.tiny_model import write_model, write_text

from hasten.compress import calibrate, structure_recipe
from hasten.compress.recipe import KEEP, Choice
from hasten.compress.run import Packer
from hasten.compress.structures import channels
from hasten.graph.sites import feed_forward_site
from hasten.search import job, widths
from hasten.search.candidates import tensors
from hasten.search.refine import Space
from hasten.search.trials import Trials
from hasten.search.widths import Widths

CLIP = Choice("int4-g64", "clip")


def convex(seed: int, steps: int) -> tuple[float, ...]:
    """A loss that rises ever faster."""
    return (0.0, *np.cumsum(np.sort(np.random.default_rng(seed).lognormal(-8, 2, steps))))


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.4])
def test_the_widths_lose_the_least_of_all_that_keep_the_share(share: float) -> None:
    made = Widths((0, 1, 2, 3), (160, 160, 160, 160), (32,) * 4, tuple(convex(seed, 4) for seed in range(4)))
    keep = made.keep(share)
    assert sum(keep) >= share * 640 > sum(keep) - 32
    ways = [w for w in itertools.product((160, 128, 96, 64, 32), repeat=4) if sum(w) == sum(keep)]
    assert made.loss(keep) == pytest.approx(min(made.loss(w) for w in ways))
    assert len(ways) > 1


def test_blocks_of_several_widths_and_nothing_beyond_the_last_unit() -> None:
    made = Widths((0, 1), (96, 256), (32, 128), ((0.0, 1.0, 9.0), (0.0, 2.0)))
    assert made.keep(1.0) == (96, 256)
    assert made.keep(0.0) == (32, 128)
    assert made.keep(0.9) == (64, 256)
    assert made.keep(0.6) == (96, 128)  # a channel of the second costs half as much
    assert made.loss((64, 128)) == 3.0
    assert made.recipe((64, 256)) == {"feed_forward": [{"keep": 64, "blocks": [0]}]}
    assert made.recipe((96, 256)) == {"feed_forward": []}


def test_a_curve_is_what_removing_channels_does() -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(500, 96)) * rng.lognormal(0, 1, 96)) @ (np.eye(96) + 0.2 * rng.normal(size=(96, 96)))
    down, hessian = rng.normal(size=(40, 96)).astype(np.float32), x.T @ x / len(x)
    found = channels.curve(down, hessian, 2, damping=1e-9)
    assert len(found) == 48
    assert found[0] == 0.0
    kept, repaired = channels.choose(down, hessian, 96 - 2 * channels.ROUNDS, damping=1e-9)  # as many at a time
    lost = np.mean(np.sum((x @ down.T - x[:, kept] @ repaired.T) ** 2, axis=1))
    assert found[channels.ROUNDS] == pytest.approx(lost, rel=1e-4)
    one = channels.curve(down[:, :64], hessian[:64, :64], 32, damping=1e-9)
    order = np.argsort(np.sum(down[:, :64] ** 2, axis=0) / np.diagonal(np.linalg.inv(hessian[:64, :64])))
    kept = np.sort(order[32:])
    best = np.linalg.lstsq(x[:, kept], x[:, :64] @ down[:, :64].T, rcond=None)[0]
    lost = np.mean(np.sum((x[:, :64] @ down[:, :64].T - x[:, kept] @ best) ** 2, axis=1))
    assert one[1] == pytest.approx(lost, rel=1e-4)


def test_found_of_a_model_and_kept(quick, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    folder = write_model(tmp_path / "model", feed_forward=256)
    asked = settings((folder, write_text(tmp_path / "text", 12000)), tmp_path / "out", budget="kl=50")
    work = job.prepare(asked, lambda *a: None, lambda text: None)
    names = [feed_forward_site(work.graph, b).output.weights[0] for b in range(2)]
    seen = calibrate.calibrate(
        work.graph, work.original, work.texts.calibration, kv_format=work.kv_format, hessians=names, threads=1
    )
    found = [t for t in tensors(work.graph, work.original) if t.name in names]
    space = Space(found, [], [[0.0 if c == KEEP else 0.01 * (1 + i) for i, c in enumerate(t.choices)] for t in found])
    packer = Packer(work.original, work.model.tensor, seen.inputs)
    with Trials(tmp_path / "work", keep=True) as trials:
        first = widths.find(work.graph, seen, space, packer, trials, "k", lambda *a: None)
        monkeypatch.setattr(channels, "curve", None)  # nothing is made twice
        again = widths.find(work.graph, seen, space, packer, trials, "k", lambda *a: None)
    assert first is not None
    assert first == again
    assert first.full == (256, 256)
    assert [len(row) for row in first.losses] == [8, 8]
    assert all(b >= a for row in first.losses for a, b in itertools.pairwise(row))
    plan = structure_recipe.parse(first.recipe(first.keep(0.5))).plan(work.graph, work.model.structure)
    assert sum(plan.channels.get(b, 256) for b in range(2)) == 256
    dead = Space(found, [], [[0.0] * len(t.choices) for t in found])
    with Trials(tmp_path / "dead", keep=True) as trials:
        monkeypatch.setattr(channels, "curve", lambda down, hessian, unit: [float(k) for k in range(8)])
        nothing = widths.find(work.graph, seen, dead, packer, trials, "k", lambda *a: None)
        assert nothing is not None
        assert nothing.loss(nothing.keep(0.25)) == 0.0
        half = replace(space, losses=[space.losses[0], [0.0, *[float("inf")] * (len(space.losses[1]) - 1)]])
        one = widths.find(work.graph, seen, half, packer, trials, "k", lambda *a: None)
        assert one is not None
        assert set(one.narrowed(one.keep(0.5))) == {0}  # what nothing is known of stays as it is
    unknown = Space(found, [], [[0.0, *[float("inf")] * (len(t.choices) - 1)] for t in found])
    with Trials(tmp_path / "other", keep=True) as trials:
        assert widths.find(work.graph, seen, unknown, packer, trials, "k", lambda *a: None) is None
