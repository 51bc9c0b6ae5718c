"""CVXPY with SCIP: the published route to this problem, without its change of the question.

CVXPY accepts a quadratic objective only when it is convex. The matrix is shifted on its diagonal,
which is a constant on one-hot vectors (``convex_shift``), and never projected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.linear import RowList, objective_tolerance
from bitquota.solver.backends.shift import convex_shift

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task

_LIMITS = {"timelimit": "time", "nodelimit": "node", "totalnodelimit": "node", "memlimit": "memory"}


def optimise(task: Task) -> Answer:
    """Solve one task; called in the child process."""
    import cvxpy as cp

    model = task.model
    n = model.n_rows
    shift = convex_shift(model.cross, model.diagonal)
    x = cp.Variable(n, boolean=True)
    objective = (model.diagonal - shift / 2) @ x
    if model.cross.any():
        Q = model.cross + np.diag(shift)
        objective += 0.5 * cp.quad_form(x, cp.psd_wrap(Q))
    rows = RowList.of(task, None)
    matrix, lower, upper = rows.matrix(n), np.array(rows.lower), np.array(rows.upper)
    equal = lower == upper
    constraints = [matrix[equal] @ x == upper[equal]]
    if not equal.all():
        constraints.append(matrix[~equal] @ x <= upper[~equal])
    parameters: dict[str, float] = {
        "limits/gap": task.gap,
        "randomization/randomseedshift": task.seed % 2**31,
        "lp/threads": 1,
    }
    if task.time_limit_s is not None:
        parameters["limits/time"] = task.time_limit_s
    if task.node_limit is not None:
        parameters["limits/totalnodes"] = task.node_limit
    problem = cp.Problem(cp.Minimize(objective), constraints)
    try:
        problem.solve(solver=cp.SCIP, scip_params=parameters)
    except cp.SolverError:
        # CVXPY's word for "stopped without a solution".
        return Answer(status="unknown", limit="time" if task.node_limit is None else "node")
    scip = problem.solver_stats.extra_stats["model"]
    said, nodes = scip.getStatus(), int(scip.getNTotalNodes())
    if said in {"infeasible", "inforunbd"}:
        return Answer(status="infeasible", nodes=nodes)  # never unbounded: all is binary
    chosen = None if x.value is None else model.pick(np.asarray(x.value))
    done = said in {"optimal", "gaplimit"}
    return Answer(
        status="optimal" if done else ("unknown" if chosen is None else "feasible"),
        limit=_LIMITS.get(said),
        chosen=chosen,
        # CVXPY's objective has no constant: ours is added here.
        bound=float(scip.getDualbound()) + model.constant,
        tolerance=objective_tolerance(model) + 1e-6 * float(shift.max(initial=0.0)),
        nodes=nodes,
    )
