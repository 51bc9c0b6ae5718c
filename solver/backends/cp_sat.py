"""OR-Tools CP-SAT: integers throughout.

The objective is rounded down to multiples of a power of two, so a bound of CP-SAT is a bound of the
objective, and the objective is at most ``tolerance`` above it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.model import Products

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task

_LARGEST_SUM = 2.0**50
"""Of the integer objective's coefficients, far from what overflows."""


def optimise(task: Task) -> Answer:
    """Solve one task; called in the child process."""
    from ortools.sat.python import cp_model

    model, products = task.model, Products.of(task.model)
    n = model.n_rows
    weights = np.concatenate([products.linear, products.weight, [products.constant]])
    unit = 2.0 ** math.ceil(math.log2(max(float(np.abs(weights).sum()), 1e-300) / _LARGEST_SUM))
    whole = np.floor(weights / unit).astype(np.int64)
    cp = cp_model.CpModel()
    x = [cp.new_bool_var(f"x{p}") for p in range(n)]
    y = [cp.new_bool_var(f"y{k}") for k in range(len(products.left))]
    spans = zip(model.offsets[:-1].tolist(), model.offsets[1:].tolist(), strict=True)
    for start, stop in spans:
        cp.add_exactly_one(x[start:stop])
    for cost, limit in zip(model.costs.tolist(), model.limits.tolist(), strict=True):
        cp.add(cp_model.LinearExpr.weighted_sum(x, cost) <= limit)
    for a, b in model.pairs.tolist():
        cp.add_at_most_one([x[a], x[b]])
    for cover in task.covers:
        cp.add(sum(x[p] for p in cover.tolist()) <= task.cover_limit(cover))
    for k, (p, q) in enumerate(zip(products.left.tolist(), products.right.tolist(), strict=True)):
        if products.weight[k] > 0:  # pressed down: only from below
            cp.add_bool_or([x[p].negated(), x[q].negated(), y[k]])
        else:
            cp.add_implication(y[k], x[p])
            cp.add_implication(y[k], x[q])
    cp.minimize(cp_model.LinearExpr.weighted_sum([*x, *y], whole[:-1].tolist()) + int(whole[-1]))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = task.seed
    solver.parameters.relative_gap_limit = task.gap
    solver.parameters.linearization_level = 2
    if task.time_limit_s is not None:
        solver.parameters.max_time_in_seconds = task.time_limit_s
    status = solver.solve(cp, _Reporter(cp_model, task, x))
    if status == cp_model.INFEASIBLE:
        return Answer(status="infeasible")
    # Each choice has G linear terms, G (G - 1) / 2 products and the constant rounded down.
    groups = model.n_groups
    tolerance = unit * (groups * (groups + 1) // 2 + 1)
    if status == cp_model.MODEL_INVALID:
        msg = f"CP-SAT refuses the model: {cp.validate()}"
        raise RuntimeError(msg)
    found = status in {cp_model.OPTIMAL, cp_model.FEASIBLE}
    chosen = None
    if found:
        chosen = model.pick(np.array([float(solver.value(v)) for v in x]))
    bound = solver.best_objective_bound * unit
    stopped = status != cp_model.OPTIMAL
    return Answer(
        status="optimal" if not stopped else ("feasible" if found else "unknown"),
        limit="time" if stopped else None,
        chosen=chosen,
        bound=bound,
        tolerance=tolerance,
        nodes=int(solver.num_branches),
    )


def _Reporter(cp_model: Any, task: Task, x: list[Any]) -> Any:  # noqa: ANN401, N802
    """Return a callback of CP-SAT's own class, which exists only once it is imported."""

    class Reporter(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
        def on_solution_callback(self) -> None:
            values = np.array([float(self.value(v)) for v in x])
            task.report(task.model.pick(values))

    return Reporter()
