"""Picks one candidate per tensor: the least cost whose losses add up to no more than a budget.

A multiple-choice knapsack, solved as an integer program by HiGHS (Huangfu and Hall 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.errors import BudgetError

Choices = Sequence[Sequence[float]]


def allocate(costs: Choices, losses: Choices, budget: float, seconds: float = 20.0) -> list[int]:
    """costs[t][c], losses[t][c] -> the candidate chosen for each tensor t.

    Minimises sum of costs subject to sum of losses <= budget. Optimal to a relative gap of 1e-6, or the best found when
    `seconds` are over. Raises BudgetError where even the least losses exceed the budget.
    """
    assert len(costs) == len(losses)
    least = sum(min(row) for row in losses)
    if least > budget:
        raise BudgetError(f"the least loss that can be reached is {least:.3g}, the budget is {budget:.3g}")
    kept = [undominated(cost, loss, budget) for cost, loss in zip(costs, losses, strict=True)]
    flat = [(t, c) for t, row in enumerate(kept) for c in row]
    if not flat:
        return []
    flat_costs = np.array([costs[t][c] for t, c in flat], dtype=np.float64)
    flat_losses = np.array([losses[t][c] for t, c in flat], dtype=np.float64)
    scale = np.abs(flat_costs).max() or 1.0
    values = _solve(flat_costs / scale, flat_losses / (budget or 1.0), [len(row) for row in kept], seconds)
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


def _solve(cost: np.ndarray, loss: np.ndarray, sizes: list[int], seconds: float) -> np.ndarray:
    """Cost [choices], loss [choices] relative to the budget; `sizes` says how many belong to each tensor."""
    import highspy

    count, tensors = len(cost), len(sizes)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = count, tensors + 1
    model.col_cost_ = cost
    model.col_lower_, model.col_upper_ = np.zeros(count), np.ones(count)
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    model.row_lower_ = np.concatenate([np.ones(tensors), [-highspy.kHighsInf]])
    # HiGHS lets a constraint be missed by its tolerance; a bound that much lower keeps the sum within the budget.
    model.row_upper_ = np.concatenate([np.ones(tensors), [1.0 - 1e-9 if loss.any() else 1.0]])
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    owner = np.repeat(np.arange(tensors), sizes)
    model.a_matrix_.start_ = np.arange(count + 1) * 2
    model.a_matrix_.index_ = np.stack([owner, np.full(count, tensors)], axis=1).ravel()
    model.a_matrix_.value_ = np.stack([np.ones(count), loss], axis=1).ravel()
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
    if len(solution) != count:
        status = solver.modelStatusToString(solver.getModelStatus())
        raise BudgetError(f"no allocation found: the solver says '{status}'")
    return solution
