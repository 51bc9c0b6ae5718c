"""OR-Tools CP-SAT: integers throughout.

The objective is rounded down to multiples of a power of two, so a bound of CP-SAT is a bound of the
objective, and the objective is at most ``tolerance`` above it. Loaded in the child process only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from ortools.sat.python import cp_model

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.model import Products

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task

_LARGEST_SUM = 2.0**50
"""Of the integer objective's coefficients, far from what overflows."""


def optimise(task: Task) -> Answer:
    """Solve one task."""
    products = Products.of(task.model)
    cp = cp_model.CpModel()
    x = _constrained(cp, task)
    # Objective: y stands for a product of two rows.
    weights = np.concatenate([products.linear, products.weight, [products.constant]])
    unit = 2.0 ** math.ceil(math.log2(max(float(np.abs(weights).sum()), 1e-300) / _LARGEST_SUM))
    whole = np.floor(weights / unit).astype(np.int64)
    y = [cp.new_bool_var(f"y{k}") for k in range(len(products.left))]
    for k, (p, q) in enumerate(zip(products.left.tolist(), products.right.tolist(), strict=True)):
        if products.weight[k] > 0:  # pressed down: only from below
            cp.add_bool_or([x[p].negated(), x[q].negated(), y[k]])
        else:
            cp.add_implication(y[k], x[p])
            cp.add_implication(y[k], x[q])
    cp.minimize(cp_model.LinearExpr.weighted_sum([*x, *y], whole[:-1].tolist()) + int(whole[-1]))
    # Goal and limits.
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = task.seed
    solver.parameters.relative_gap_limit = task.gap
    solver.parameters.linearization_level = 2
    if task.time_limit_s is not None:
        solver.parameters.max_time_in_seconds = task.time_limit_s
    status = solver.solve(cp, _Reporter(task, x))
    # What it says.
    if status == cp_model.INFEASIBLE:
        return Answer(status="infeasible")
    if status == cp_model.MODEL_INVALID:
        msg = f"CP-SAT refuses the model: {cp.validate()}"
        raise RuntimeError(msg)
    stopped = status != cp_model.OPTIMAL
    found = status in {cp_model.OPTIMAL, cp_model.FEASIBLE}
    # Each choice has G linear terms, G (G - 1) / 2 products and the constant rounded down.
    groups = task.model.n_groups
    return Answer(
        status="optimal" if not stopped else ("feasible" if found else "unknown"),
        limit="time" if stopped else None,
        chosen=_picked(task, solver, x) if found else None,
        bound=solver.best_objective_bound * unit,
        tolerance=unit * (groups * (groups + 1) // 2 + 1),
        nodes=int(solver.num_branches),
    )


def _constrained(cp: cp_model.CpModel, task: Task) -> list[Any]:
    """Add a variable for each row, and all constraints; returns the variables."""
    model = task.model
    x = [cp.new_bool_var(f"x{p}") for p in range(model.n_rows)]
    for start, stop in model.spans:
        cp.add_exactly_one(x[start:stop])
    for cost, limit in zip(model.costs.tolist(), model.limits.tolist(), strict=True):
        cp.add(cp_model.LinearExpr.weighted_sum(x, cost) <= limit)
    for a, b in model.pairs.tolist():
        cp.add_at_most_one([x[a], x[b]])
    for cover in task.covers:
        cp.add(sum(x[p] for p in cover.tolist()) <= task.cover_limit(cover))
    return x


def _picked(task: Task, solver: Any, x: list[Any]) -> np.ndarray:  # noqa: ANN401
    return task.model.pick(np.array([float(solver.value(v)) for v in x]))


class _Reporter(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
    """Reports better solutions on the way."""

    def __init__(self, task: Task, x: list[Any]) -> None:
        super().__init__()
        self._task, self._x = task, x

    def on_solution_callback(self) -> None:
        """Called by CP-SAT, whose solver this is at that moment."""
        self._task.report(_picked(self._task, self, self._x))
