from __future__ import annotations

import itertools

import numpy as np
import pytest

from hasten.errors import BudgetError
from hasten.search.allocate import allocate, undominated


def brute_force(costs, losses, budget):
    """Least cost over every combination that fits."""
    best = None
    for picks in itertools.product(*(range(len(row)) for row in costs)):
        if sum(losses[t][c] for t, c in enumerate(picks)) <= budget:
            cost = sum(costs[t][c] for t, c in enumerate(picks))
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(25))
def test_as_good_as_trying_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = int(rng.integers(1, 6))
    costs = [rng.uniform(0.01, 1, rng.integers(1, 6)).tolist() for _ in range(tensors)]
    losses = [(rng.uniform(0, 1, len(row)) ** 3 * 10.0 ** rng.integers(-6, 0)).tolist() for row in costs]
    for row in losses:
        row[0] = 0.0
    budget = float(rng.uniform(0, 1) ** 2 * sum(max(row) for row in losses))
    chosen = allocate(costs, losses, budget)
    assert sum(losses[t][c] for t, c in enumerate(chosen)) <= budget * (1 + 1e-9)
    cost = sum(costs[t][c] for t, c in enumerate(chosen))
    assert cost == pytest.approx(brute_force(costs, losses, budget), rel=1e-5)


def test_zero_budget_takes_what_loses_nothing() -> None:
    assert allocate([[3.0, 1.0, 2.0], [1.0, 0.5]], [[0.0, 1e-9, 0.0], [0.0, 1e-12]], 0.0) == [2, 0]


def test_a_budget_below_the_least_loss_is_refused() -> None:
    with pytest.raises(BudgetError, match="least loss"):
        allocate([[1.0]], [[0.5]], 0.1)


def test_more_budget_never_costs_more() -> None:
    rng = np.random.default_rng(0)
    costs = rng.uniform(0, 1, (40, 8)).tolist()
    losses = (rng.uniform(0, 1, (40, 8)) ** 4).tolist()
    least = sum(min(row) for row in losses)
    totals = []
    for budget in np.linspace(least * 1.01, least + 1.0, 8):
        chosen = allocate(costs, losses, float(budget))
        totals.append(sum(costs[t][c] for t, c in enumerate(chosen)))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(totals))


def test_undominated() -> None:
    assert undominated([4, 3, 3, 1, 0.5], [0, 1, 2, 3, 9], 5) == [0, 1, 3]
