"""OR-Tools MathOpt with its built-in SCIP: the quadratic objective as it is, made convex.

MathOpt hands the objective to SCIP as a quadratic constraint; the shift that makes it convex is a
constant on one-hot vectors (``convex_shift``).
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.linear import RowList, objective_tolerance
from bitquota.solver.backends.shift import convex_shift

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task


def optimise(task: Task) -> Answer:
    """Solve one task; called in the child process."""
    from ortools.math_opt.python import mathopt

    model = task.model
    shift = convex_shift(model.cross, model.diagonal)
    Q = model.cross + np.diag(shift) if len(model.cross) else model.cross
    mo = mathopt.Model()
    x = [mo.add_binary_variable(name=f"x{p}") for p in range(model.n_rows)]
    rows = RowList.of(task, None)
    for columns, values, lower, upper in zip(
        rows.columns, rows.values, rows.lower, rows.upper, strict=True
    ):
        terms = zip(columns.tolist(), values.tolist(), strict=True)
        expression = mathopt.fast_sum(value * x[p] for p, value in terms)
        mo.add_linear_constraint(lb=lower, ub=upper, expr=expression)
    linear = mathopt.fast_sum(
        float(v) * x[p] for p, v in enumerate(model.diagonal - shift / 2) if v
    )
    left, right = np.nonzero(np.triu(Q))
    weight = np.where(left == right, 0.5, 1.0) * Q[left, right]
    quadratic = mathopt.fast_sum(
        float(w) * x[p] * x[q]
        for p, q, w in zip(left.tolist(), right.tolist(), weight.tolist(), strict=True)
    )
    mo.minimize(linear + quadratic + model.constant)
    parameters = mathopt.SolveParameters(
        threads=1,
        random_seed=task.seed,
        relative_gap_tolerance=task.gap,
        node_limit=task.node_limit,
    )
    if task.time_limit_s is not None:
        parameters.time_limit = dt.timedelta(seconds=task.time_limit_s)
    result = mathopt.solve(mo, mathopt.SolverType.GSCIP, params=parameters)
    termination, reason = result.termination, mathopt.TerminationReason
    nodes = int(result.solve_stats.node_count)
    if termination.reason in {reason.INFEASIBLE, reason.INFEASIBLE_OR_UNBOUNDED}:
        return Answer(status="infeasible", nodes=nodes)  # never unbounded: all is binary
    chosen, limit = None, None
    if result.has_primal_feasible_solution():
        values = result.variable_values()
        chosen = model.pick(np.array([values[v] for v in x]))
    if termination.limit is not None:
        names = {mathopt.Limit.TIME: "time", mathopt.Limit.NODE: "node"}
        limit = names.get(termination.limit, "memory")
    done = termination.reason == reason.OPTIMAL
    return Answer(
        status="optimal" if done else ("unknown" if chosen is None else "feasible"),
        limit=limit,
        chosen=chosen,
        bound=float(termination.objective_bounds.dual_bound),
        tolerance=objective_tolerance(model) + 1e-6 * float(shift.max(initial=0.0)),
        nodes=nodes,
    )
