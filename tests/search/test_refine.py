from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hasten.bench.latency import Times
from hasten.compress.recipe import KEEP, Choice
from hasten.errors import BudgetError
from hasten.search import speed
from hasten.search.budget import UNBOUNDED, Budgets, parse_all
from hasten.search.candidates import Tensor
from hasten.search.quality import Bounds, Reading, Readings, broken, ratio_reading
from hasten.search.refine import ROUNDS, Refiner, Space, next_allowance

SMALL, LARGE = Choice("int4-g64", "clip"), Choice("int8-g64", "clip")


def space(count: int = 12, seed: int = 0) -> Space:
    rng = np.random.default_rng(seed)
    tensors = [Tensor(f"b.{i}.w", (64, 64), "f32", i, 1, 0, False, (KEEP, LARGE, SMALL)) for i in range(count)]
    losses = [[0.0, float(v) / 50, float(v)] for v in rng.lognormal(-7, 1, count)]
    return Space(tensors, [[4.0, 2.0, 1.0]] * count, losses)


class Judge:
    """A world in which the whole's loss is `factor` times its parts' sum to a power, known within `spread`.

    Of further parts of a budget the loss is so many times as large as `further` says.
    """

    def __init__(self, space: Space, factor: float, power: float = 1.0, spread: float = 0.0, further=()) -> None:
        self.space, self.factor, self.power, self.spread, self.calls = space, factor, power, spread, 0
        self.further = further

    def loss(self, facts) -> float:
        rows = zip(self.space.tensors, self.space.losses, strict=True)
        return self.factor * sum(row[t.choices.index(Choice(*facts[t.name]))] for t, row in rows) ** self.power

    def read(self, name, facts, weights) -> Readings:
        self.calls += 1
        losses = [self.loss(facts) * times for times in (1.0, *self.further)]
        return tuple(Reading(v, v - self.spread, v + self.spread, 10_000) for v in losses)


def refiner(world: Space, judge: Judge, budget: str = "ppl=1%", most_bytes: int | None = None) -> Refiner:
    budgets: Budgets = parse_all(budget)
    bounds = Bounds(budgets, (40_000,) * len(budgets.parts))
    return Refiner(world, judge, lambda choices: {}, bounds, most_bytes, [])


@pytest.mark.parametrize(("factor", "power"), [(1.0, 1.0), (0.2, 1.0), (6.0, 1.0), (30.0, 1.5), (0.3, 0.7)])
def test_comes_near_the_budget_from_below(factor: float, power: float) -> None:
    world = space()
    judge = Judge(world, factor, power)
    one = refiner(world, judge)
    one.search()
    fitting = [t for t in one.tried if t.fits]
    assert judge.calls <= ROUNDS
    assert all(t.reading.estimate <= 0.01 for t in fitting)
    # Nothing that a finer sweep of allowances finds within the budget is much cheaper.
    sweep = [world.allocate(a) for a in np.geomspace(1e-5, 1.0, 150)]
    within = [c for c in sweep if judge.loss({n: [k.format, k.method] for n, k in c.items()}) <= 0.01]
    best = min(world.cost(c) for c in within)
    assert min(t.cost for t in fitting) <= 1.12 * best


@pytest.mark.parametrize("further", [0.1, 1.0, 30.0])
def test_every_part_of_a_budget_holds(further: float) -> None:
    """The second part uses itself up sooner or later than the first: the stricter one decides."""
    world = space()
    one = refiner(world, Judge(world, 1.0, further=(further,)), "ppl=1%,kl=0.02")
    one.search()
    fitting = [t for t in one.tried if t.fits]
    assert fitting
    for tried in fitting:
        assert tried.readings[0].estimate <= 0.01
        assert tried.readings[1].estimate <= 0.02
    used = max(max(t.readings[0].estimate / 0.01, t.readings[1].estimate / 0.02) for t in fitting)
    assert 0.6 < used <= 1.0
    failing = [t for t in one.tried if not t.fits]
    assert all(t.readings[0].estimate > 0.01 or t.readings[1].estimate > 0.02 for t in failing)


def test_output_that_is_no_number_keeps_no_budget() -> None:
    """Not even the one without a limit."""
    bounds = Bounds(UNBOUNDED, (1000,))
    assert bounds.fits((Reading(5.0, 4.9, 5.1, 1000),))
    assert bounds.hold((Reading(5.0, 4.9, 5.1, 1000),))
    assert not bounds.fits((broken(1000),))
    assert not bounds.hold((broken(1000),))


def test_bytes_are_bounded_too() -> None:
    world = space()
    most = (world.least_bytes() + world.bytes(world.uniform("int8-g64"))) // 2
    bound = refiner(world, Judge(world, 1.0), "ppl=100%", most)
    bound.uniforms()
    bound.search()
    assert any(t.bytes > most for t in bound.tried)  # one format everywhere, which is too large
    assert all(t.bytes <= most for t in bound.tried if t.fits)
    tight = refiner(world, Judge(world, 1.0), "ppl=0.01%", most)
    tight.search()  # what keeps the bytes does not keep the budget: it is measured, and does not fit
    assert tight.tried
    assert not any(t.fits for t in tight.tried)
    assert all(t.bytes <= most for t in tight.tried)
    nothing = refiner(world, Judge(world, 1.0), "ppl=100%", world.least_bytes() - 1)
    nothing.search()
    assert nothing.tried == []


def test_the_most_faithful_within_a_cost() -> None:
    """Against every combination of a small world."""
    world = space(5)
    for limit in (5.0, 9.5, 14.5, 20.5):  # off what sums to it exactly
        found = world.most_faithful(limit)
        assert world.cost(found) <= limit
        losses = [
            sum(world.losses[t][c] for t, c in enumerate(picks))
            for picks in itertools.product(range(3), repeat=5)
            if sum(world.costs[t][c] for t, c in enumerate(picks)) <= limit
        ]
        own = sum(row[t.choices.index(found[t.name])] for t, row in zip(world.tensors, world.losses, strict=True))
        assert own == pytest.approx(min(losses), rel=1e-5, abs=1e-12)
    with pytest.raises(BudgetError):
        world.most_faithful(4.9)


def test_uniform_candidates_keep_what_is_only_looked_up() -> None:
    world = space(2)
    table = Tensor("embed", (64, 64), "f32", -1, 0, 1, False, (KEEP, LARGE, SMALL))
    world = Space([*world.tensors, table], [*world.costs, [0.0] * 3], [*world.losses, [0.0, 0.1, 0.2]])
    assert world.uniform("int4-g64") == {"b.0.w": SMALL, "b.1.w": SMALL, "embed": KEEP}


def test_careful_is_what_nineteen_of_twenty_proofs_stay_below() -> None:
    """Simulated: a loss measured on one text, then its upper bound on another of four times the length."""
    rng = np.random.default_rng(0)
    truth, error = 0.005, 0.001
    below = 0
    for _ in range(4000):
        first = truth + rng.normal() * error
        reading = Reading(first, first - 1.96 * error, first + 1.96 * error, 10_000)
        second = truth + rng.normal() * error / 2
        below += second + 1.96 * error / 2 <= reading.careful(40_000)
    assert below / 4000 == pytest.approx(0.95, abs=0.015)


def test_next_allowance_stays_between_what_is_known() -> None:
    assert 0.01 < next_allowance((0.01, 0.005), (0.02, 0.015), 0.01) < 0.02
    assert next_allowance((0.01, 0.005), None, 0.01) == pytest.approx(0.02)
    assert next_allowance((0.01, -0.001), None, 0.01) == pytest.approx(0.04)
    assert next_allowance(None, (0.01, 0.02), 0.01) == pytest.approx(0.005)
    assert next_allowance(None, (0.01, 1e6), 0.01) == pytest.approx(0.002)


def test_ratio_reading_is_the_paired_ratio() -> None:
    rng = np.random.default_rng(0)
    original = [rng.normal(-3, 2, n).astype(np.float32) for n in (700, 900, 1400)]
    candidate = [w - 0.01 + rng.normal(0, 0.05, len(w)).astype(np.float32) for w in original]
    found = ratio_reading(original, candidate)
    difference = np.concatenate(original).astype(np.float64) - np.concatenate(candidate)
    assert found.estimate == pytest.approx(math.exp(difference.mean()) - 1)
    # Independent draws here, so the textbook's interval of a mean holds.
    error = difference.std() / math.sqrt(len(difference))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert found.tokens == 3000


def test_gain_holds_only_where_it_is_sure() -> None:
    rng = np.random.default_rng(0)
    noise = [Times(1.0, float(x), 1.0) for x in rng.normal(1.0, 0.05, 9)]
    same = [Times(1.0, float(x), 1.0) for x in rng.normal(1.0, 0.05, 9)]
    faster = [Times(2.0, float(x), 1.0) for x in rng.normal(0.5, 0.02, 9)]
    assert not speed.gain(noise, same, "decode").holds
    found = speed.gain(noise, faster, "decode")
    assert found.holds
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(2.0, rel=0.1)
    assert speed.gain(noise, faster, "prefill").estimate == 0.5


def test_out_of_time_with_nothing_that_fits_one_more_is_measured_and_that_is_careful() -> None:
    world = space()
    one = refiner(world, Judge(world, 6.0))
    one.enough_time = lambda: False
    one.search()
    daring, careful = one.tried
    assert not daring.fits
    assert careful.fits
    fitting = refiner(world, Judge(world, 1.0))
    fitting.enough_time = lambda: False
    fitting.search()
    assert [t.fits for t in fitting.tried] == [True]
