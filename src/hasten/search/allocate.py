"""Picks one candidate per tensor: the least cost whose losses add up to no more than a budget.

A multiple-choice knapsack, solved as an integer program by HiGHS (Huangfu and Hall 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import BudgetError

Choices = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Bound:
    """The sum of `values[t][c]` over what is chosen may be `limit` at most."""

    values: Choices
    limit: float
    what: str = "loss"


def allocate(
    costs: Choices, losses: Choices, budget: float, seconds: float = 20.0, also: Sequence[Bound] = ()
) -> list[int]:
    """costs[t][c], losses[t][c] -> the candidate chosen for each tensor t.

    Minimises sum of costs subject to sum of losses <= budget, and to `also`. Optimal to a relative gap of 1e-6, or the
    best found when `seconds` are over. Raises BudgetError where no choice keeps a bound, or none keeps all.
    """
    assert len(costs) == len(losses)
    bounds = [Bound(losses, budget), *also]
    for bound in bounds:
        least = sum(min(row) for row in bound.values)
        if least > bound.limit:
            raise BudgetError(
                f"the least {bound.what} that can be reached is {least:.3g}, the budget is {bound.limit:.3g}"
            )
        if least > (1 - 1e-8) * bound.limit > 0:  # nearer than the solver's tolerance: there is no other choice
            return [min(range(len(row)), key=lambda c: (row[c], costs[t][c])) for t, row in enumerate(bound.values)]
    kept = [
        undominated(cost, losses[t], budget) if not also else incomparable(t, cost, bounds)
        for t, cost in enumerate(costs)
    ]
    flat = [(t, c) for t, row in enumerate(kept) for c in row]
    if not flat:
        return []
    flat_costs = np.array([costs[t][c] for t, c in flat], dtype=np.float64)
    rows = [np.array([b.values[t][c] for t, c in flat], dtype=np.float64) / (b.limit or 1.0) for b in bounds]
    scale = np.abs(flat_costs).max() or 1.0
    values = _solve(flat_costs / scale, rows, [len(row) for row in kept], seconds)
    chosen, at = [], 0
    for row in kept:
        chosen.append(row[int(np.argmax(values[at : at + len(row)]))])
        at += len(row)
    return chosen


def undominated(costs: Sequence[float], losses: Sequence[float], budget: float) -> list[int]:
    """Candidates that no other beats in both cost and loss, and that fit the budget alone."""
    order = sorted(range(len(costs)), key=lambda c: (losses[c], costs[c], c))
    kept: list[int] = []
    for c in order:
        if not kept or (losses[c] <= budget and costs[c] < costs[kept[-1]]):
            kept.append(c)
    return kept


def incomparable(tensor: int, costs: Sequence[float], bounds: Sequence[Bound]) -> list[int]:
    """The same for several bounds: candidates of which no other is as good in everything."""
    points = [(cost, *(b.values[tensor][c] for b in bounds)) for c, cost in enumerate(costs)]
    kept = [c for c, p in enumerate(points) if all(v <= b.limit for v, b in zip(p[1:], bounds, strict=True))]

    def beaten(c: int) -> bool:
        by = [d for d in kept if all(a <= b for a, b in zip(points[d], points[c], strict=True))]
        return any(points[d] != points[c] or d < c for d in by)

    found = [c for c in kept if not beaten(c)]
    if not found:
        raise BudgetError("no choice of a matrix keeps every bound")
    return found


def _solve(cost: np.ndarray, rows: Sequence[np.ndarray], sizes: list[int], seconds: float) -> np.ndarray:
    """Cost [choices], rows [choices] relative to each bound; `sizes` says how many belong to each tensor."""
    import highspy

    count, tensors = len(cost), len(sizes)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = count, tensors + len(rows)
    model.col_cost_ = cost
    model.col_lower_, model.col_upper_ = np.zeros(count), np.ones(count)
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    model.row_lower_ = np.concatenate([np.ones(tensors), np.full(len(rows), -highspy.kHighsInf)])
    # HiGHS lets a constraint be missed by its tolerance; a bound that much lower keeps the sum within the budget.
    model.row_upper_ = np.concatenate([np.ones(tensors), [1.0 - 1e-9 if row.any() else 1.0 for row in rows]])
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    owner = np.repeat(np.arange(tensors), sizes)
    model.a_matrix_.start_ = np.arange(count + 1) * (1 + len(rows))
    places = [np.full(count, tensors + number) for number in range(len(rows))]
    model.a_matrix_.index_ = np.stack([owner, *places], axis=1).ravel()
    model.a_matrix_.value_ = np.stack([np.ones(count), *rows], axis=1).ravel()
    solver = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "time_limit": seconds,
        "mip_rel_gap": 1e-6,
        "mip_feasibility_tolerance": 1e-9,
        "primal_feasibility_tolerance": 1e-9,
    }.items():
        solver.setOptionValue(name, value)
    solver.passModel(model)
    solver.run()
    solution = np.asarray(solver.getSolution().col_value)
    status = solver.getModelStatus()
    if len(solution) != count or status == highspy.HighsModelStatus.kInfeasible:
        raise BudgetError(f"no allocation found: the solver says '{solver.modelStatusToString(status)}'")
    return solution
